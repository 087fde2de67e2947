"""Run a command of kdkit on the cardboard card: python program.py LIBRARY COMMAND FIELDS

LIBRARY is the compiled device.cpp, COMMAND train or store, FIELDS the fields of a configuration in JSON. The last line
of the output is JSON: how often the host waited for the device in the third step, by place.
"""

import ctypes
import importlib.util
import itertools
import json
import sys
from pathlib import Path


def load_device(library: str) -> None:
    """Load the compiled device.cpp. This is before `import torch`, which looks for a CUDA once."""
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so"):  # its symbols are in these
        if (folder / name).exists():
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


def main(library: str, command: str, fields: str) -> None:
    load_device(library)
    import card
    import torch

    import kdkit.targets
    import kdkit.train
    from kdkit import DistillConfig

    torch.set_num_threads(1)
    numbers, train_step = itertools.count(1), kdkit.train.train_step

    def counted(*arguments):
        card.WAITS.counting = next(numbers) == 3  # from the start of the third step to that of the fourth
        return train_step(*arguments)

    kdkit.train.train_step = counted
    run = {"train": kdkit.train.train, "store": kdkit.targets.store}[command]
    with card.cardboard():
        run(DistillConfig(**json.loads(fields)))
    print(json.dumps([[*reason_and_place, times] for reason_and_place, times in card.WAITS.items()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
