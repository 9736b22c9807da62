import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield pool
    pool.close()
