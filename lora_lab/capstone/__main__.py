"""`python -m lora_lab.capstone evidence.json ...`: the audit of evidence files, for those who mark. Exit status 1 if any has objections."""

import sys
from pathlib import Path

from .evidence import Evidence, audit


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    bad = 0
    for path in paths:
        try:
            found = [str(objection) for objection in audit(Evidence.load(Path(path)))]
        except (OSError, ValueError) as error:
            found = [str(error)]
        bad += bool(found)
        print(f"{path}: {len(found)} objection(s)" + "".join(f"\n  {text}" for text in found))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
