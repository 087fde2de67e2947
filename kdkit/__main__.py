"""Print the commands, or the folder of the accelerate configurations or recipes of this installation.

accelerate launch --config_file "$(python -m kdkit accelerate_configs)/fsdp.yaml" -m kdkit.train ...
"""

import sys
from pathlib import Path

USAGE = """usage: python -m kdkit accelerate_configs | recipes    print the folder of these files
       python -m kdkit.train --help      distil
       python -m kdkit.evaluate --help   compare finished runs
       python -m kdkit.data --help       show what a run would learn
       python -m kdkit.targets --help    store a teacher's targets"""

if __name__ == "__main__":
    package = Path(__file__).resolve().parent
    if sys.argv[1:] not in (["accelerate_configs"], ["recipes"]):
        sys.exit(USAGE)
    folders = [parent / sys.argv[1] for parent in (package, package.parent)]  # in a wheel; in a clone
    print(next(folder for folder in folders if folder.is_dir()))
