"""``eqvision ARGUMENTS...``, with the example ids of each step written to the folder $EQVISION_TEST_IDS."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import jax

from eqvision.cli import main
from eqvision.problems import Classification


def recorded(stream):
    def read(problem, start_step):
        file = Path(os.environ["EQVISION_TEST_IDS"]) / f"{start_step}-{jax.process_index()}.jsonl"
        with file.open("w") as lines:
            for step, batch in enumerate(stream(problem, start_step), start_step + 1):
                lines.write(json.dumps({"step": step, "ids": batch.indices.tolist()}) + "\n")
                lines.flush()
                yield batch

    return read


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240)  # processes that wait for each other show where
    Classification.stream = recorded(Classification.stream)
    main(sys.argv[1:])
