"""All tests, in two processes side by side, as a test mostly keeps one core busy.

    python tests/run_all.py
"""
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# about half of the work
FIRST = [TESTS / f"test_{name}.py" for name in ("pipeline", "kernels", "bench", "course", "exercises", "reason",
                                                "scale", "train")]


def main():
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    first = subprocess.Popen([*pytest, *FIRST], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=env)
    rest = subprocess.run([*pytest, TESTS, *(f"--ignore={path}" for path in FIRST)], env=env)
    print(first.communicate()[0], end="")
    sys.exit(rest.returncode or first.returncode)


if __name__ == "__main__":
    main()
