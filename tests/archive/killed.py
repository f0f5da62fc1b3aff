# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure an archive in a process that is killed, and print how it ended: ``python -m tests.archive.killed FOLDER``."""

import os
import signal
import sys
from pathlib import Path

from tests.archive import archive, labelled_images


class Killing(list):
    """Kills the process that loads the image at a place: in the middle of the second piece."""

    def __getitem__(self, place):
        if place == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(place)


def main(folder: Path) -> None:
    process = os.fork()
    if process == 0:
        archive(folder, Killing(labelled_images(12)), piece_size=4, batch_size=2).run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
