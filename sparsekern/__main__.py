"""`sparsekern` and `python -m sparsekern`: the command line, as far as its libraries are there."""

from __future__ import annotations

import sys

# What the extras `demo`, `bench`, `onnx` and `openvino` install, by import name.
ONNX = ("onnx", "onnxruntime", "onnxscript")
EXTRAS = ("matplotlib", "PIL", "rich", "tomli", "torchmetrics", "typer", "openvino", *ONNX)


def main() -> int:
    """Runs the command line on `sys.argv`; returns the exit code."""
    try:
        from sparsekern.cli import run

        return run(sys.argv[1:])
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "torchvision":  # it is there, and does not fit torch
            sys.stderr.write(f"error: {error}\n")
            return 2
        if missing not in EXTRAS or not isinstance(error, ModuleNotFoundError):
            raise
        if sys.argv[1:] == ["info"]:  # the first thing in a bug report, so it needs no extras
            from sparsekern import info as _info

            for name, value in _info.lines(_info.collect()):
                sys.stdout.write(f"{name:20} {value}\n")
            return 0
        extra = "bench" if sys.argv[1:2] == ["bench"] else "demo"
        if missing in ONNX:
            extra = "onnx"
        if missing == "openvino":
            extra = "openvino"
        sys.stderr.write(
            f"error: the sparsekern command needs {missing}, which is not installed; run: "
            f'pip install "sparsekern[{extra}]"\n'
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
