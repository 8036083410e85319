"""``eqvision doctor``: devices, versions, decoders, disk: what a bug report needs."""

from dataclasses import dataclass

from eqvision.commands.arguments import parse


@dataclass(frozen=True)
class DoctorOptions:
    """Look at this machine and run a training step on each of its devices; exit code 1 if there is a problem."""

    workers: int = 0
    """Processes that will read data (--data.num-workers): more need more shared memory."""
    json: bool = False
    """Print the same as JSON."""


def run(arguments: list[str]) -> None:
    options = parse(DoctorOptions, arguments, "eqvision doctor")
    from eqvision.doctor import as_json, examine, table

    findings = examine(workers=options.workers)
    print(as_json(findings) if options.json else table(findings))
    if any(finding.problem for finding in findings):
        raise SystemExit(1)
