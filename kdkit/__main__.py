"""Print the folder of the accelerate configurations or recipes of this installation.

accelerate launch --config_file "$(python -m kdkit accelerate_configs)/fsdp.yaml" -m kdkit.train ...
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    package = Path(__file__).resolve().parent
    if sys.argv[1:] not in (["accelerate_configs"], ["recipes"]):
        sys.exit("usage: python -m kdkit accelerate_configs | recipes; to distil: python -m kdkit.train --help")
    folders = [parent / sys.argv[1] for parent in (package, package.parent)]  # in a wheel; in a clone
    print(next(folder for folder in folders if folder.is_dir()))
