"""The command line: ``eqvision COMMAND ...``. Heavy imports wait until a command needs them."""

import importlib
import os
import sys

from eqvision.commands.arguments import fail, unknown

USAGE = """usage: eqvision COMMAND ...

  train RECIPE [options]          train, or resume, a recipe; --help lists its options
  eval RUN_OR_MODEL [options]     evaluate a run or published weights: test split, linear probe, few-shot, kNN
  predict RUN_OR_MODEL IMAGE...   label images, find objects or masks in them, and draw the result
  replay RUN_FOLDER --step K      run one step of a run again and show what happened in it
  checkpoint inspect PATH         what a checkpoint holds, and whether it is undamaged
  export RUN_OR_MODEL [options]   write StableHLO or safetensors
  convert SOURCE OUT --to WHERE   weights in the names of another library: eqvision, timm, hf, torchvision ...
  info MODEL [options]            parameters, multiply-adds, feature shapes and published weights of a model
  list [PATTERN] [--pretrained]   names of models, such as: eqvision list 'vit*', or their published weights
  config RECIPE [options]         the resolved configuration of a recipe, as YAML
  data check PATH                 find corrupt images; write the list of them and an index of the rest
  data convert SOURCE OUT.json    boxes of Pascal VOC or YOLO as COCO JSON
  viz data|attention ...          pictures of augmented batches and of attention
  demo sam [options]              a page on this machine: click on an image, and see the mask
  doctor                          devices, versions, decoders, disk: what a bug report needs

recipes: {recipes}
Each command explains its options with --help."""

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on

COMMANDS = [  # eqvision/commands/NAME.py
    "train",
    "eval",
    "predict",
    "replay",
    "checkpoint",
    "export",
    "convert",
    "info",
    "list",
    "config",
    "data",
    "viz",
    "demo",
    "doctor",
]


def main(arguments: list[str] | None = None) -> None:
    """Entry point; errors that the user can mend are printed without a trace and exit with code 2.

    A run that was asked to stop (SIGTERM, Ctrl-C) exits with code 75 when its state is saved.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_usage())
        return
    if command not in COMMANDS:
        fail(unknown("command", command, COMMANDS))
    try:
        importlib.import_module(f"eqvision.commands.{command}").run(rest)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has gone: nothing more can be printed, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except _stopped() as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(EXIT_STOPPED) from None
    except _expected_errors() as error:
        if os.environ.get("EQVISION_TRACEBACK"):
            raise
        # JAX adds a note of its own, about its traceback, which begins with a rule.
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()) if not note.startswith("--"))
        fail(f"{error.args[0] if isinstance(error, KeyError) else error}{notes}")


def _stopped() -> type[Exception]:
    from eqvision.signals import StoppedError

    return StoppedError


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors about what was given. Anything else is a defect and shows its trace."""
    from eqvision.checkpoint import CheckpointError
    from eqvision.data import CorruptImageError
    from eqvision.distributed import MeetingError
    from eqvision.profiling import DeviceMemoryError
    from eqvision.run_folder import RunFolderError
    from eqvision.window import DivergedError

    return (
        ValueError,
        OSError,
        KeyError,
        CorruptImageError,
        ImportError,
        CheckpointError,
        DeviceMemoryError,
        MeetingError,
        RunFolderError,
        DivergedError,
    )


def _usage() -> str:
    from eqvision.recipes import RECIPES

    return USAGE.format(recipes=", ".join(RECIPES))


if __name__ == "__main__":
    main()
