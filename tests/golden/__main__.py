"""`python -m tests.golden`: compare what is learned now with the golden files, byte for byte; `--write` makes them."""

from __future__ import annotations

import sys

from tests.golden.learned import CASES, compare, learn_all, read, write


def main() -> None:
    found = learn_all(list(CASES))
    if "--write" in sys.argv[1:]:
        write(found)
        return
    wrong = 0
    for case, (same, difference) in compare(found, read()).items():
        wrong += not same
        print(f"{case}: {'the golden bytes' if same else f'OTHER BYTES, masks differ by at most {difference:.2e}'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
