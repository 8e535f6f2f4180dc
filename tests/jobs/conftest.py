"""What several job tests train on, made once a file."""

import pytest

from c2al.distributed.process import process_group
from impressions import splits


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return splits(tmp_path_factory.mktemp("impressions"))


@pytest.fixture(scope="module")
def world(config):
    with process_group(config.dist) as world:
        yield world
