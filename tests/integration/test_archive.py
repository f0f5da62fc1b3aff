# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The archive of a bundle, by the two command lines of its config: shared by two processes, and by one."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.bundle import ConfigParser

from monai_ifim.results import read_tables
from tests.archive import contents
from tests.integration.runs import BUNDLES, command, flags, run_all

BUNDLE = BUNDLES / "signal_detection"


def lines() -> list[str]:
    """The command lines at the head of the config, the plain one first."""
    head = "".join(line[1:] for line in (BUNDLE / "configs" / "ifim_archive.yaml").read_text().splitlines(True))
    head = head.replace("\\\n", "")
    return [line.strip() for line in head.splitlines() if "monai.bundle run archiving" in line]


def test_two_processes_of_torchrun_and_one_write_the_same_archive_and_no_process_waits(tmp_path: Path):
    plain, shared = lines()
    assert plain.startswith("python -m ")
    assert shared.startswith("torchrun --standalone --nnodes=1 --nproc_per_node=2 -m ")
    parser = ConfigParser(ConfigParser.load_config_file(BUNDLE / "configs" / "train.yaml"))
    parser.update({"spatial_size": [12, 12]})
    parser.get_parsed_content("imports")
    network = parser.get_parsed_content("network")
    torch.save({"model": network.state_dict()}, tmp_path / "model.pt")
    options = {"spatial_size": [12, 12], "archive_samples": 11, "archive#piece_size": 4, "ckpt_dir": tmp_path}
    options |= {"archive#strengths": [0.03], "archive#directions": ["high", "transfer"]}
    run_all(
        [
            command("shared", shared + flags({**options, "output_dir": tmp_path / "shared"}), BUNDLE),
            # in the first of both processes, which then knows of no other
            command(
                *("plain", plain + flags({**options, "output_dir": tmp_path / "plain"}), BUNDLE),
                rank=0,
                environment={"WORLD_SIZE": "1"},
            ),
        ],
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    )
    # process 1 may still have been measuring when process 0 went on
    assert contents(tmp_path / "shared" / "archive") == contents(tmp_path / "plain" / "archive")
    tables = read_tables(tmp_path / "plain" / "archive" / "ifim")
    assert len(tables.images) == 11
    assert tables.images.reference_cosine.between(0, 1).all()
