"""Let the threads of one operation wait for each other without keeping other programs off the processors."""

import os

_SPINS = "4000"


def wait_briefly() -> None:
    """Make OpenMP's threads sleep soon where they wait for one another; call it before torch is imported.

    At the end of each of its loops an operation's threads wait until all are done. GNU's OpenMP, which torch has on
    Linux, first looks 300,000 times in a row, some milliseconds. If another program has the processor of the thread
    that is waited for, that time is lost, to both, at each of a training step's thousands of loops.

    Steps of quickstart on 2 cores of an AMD EPYC (Zen 4), alone and beside one busy process: 0.58 to 0.64 and 1.7 to
    2.0 s as torch comes, 0.60 and 1.31 s with the 4,000 looks that the commands set, 0.64 and 1.15 s with 1,000, 0.59
    and 1.66 s with 10,000, 0.64 and 1.06 s with ``OMP_WAIT_POLICY=passive``. For a loop of one's own set
    ``GOMP_SPINCOUNT=4000`` in the environment. Whoever sets that variable or ``OMP_WAIT_POLICY`` decides.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
