import pytest

from tests.distributed import training
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def trained(ranks, tmp_path_factory):
    """Run folders by what they were trained with; each run is trained once. Alone, or on `world` ranks of an engine."""
    folder = tmp_path_factory.mktemp("trained")
    data = training.write_data(folder / "data")
    runs = {}

    def find(parallel="ddp", world=1, double=True, **chosen):
        key = (parallel, world, double, *sorted(chosen.items()))
        if key not in runs:
            runs[key] = folder / f"run-{len(runs)}"
            settings = training.settings(data, runs[key], parallel=parallel, **chosen)
            if world == 1:
                training.run(settings, double=double)
            else:
                ranks.run(training.run, settings, False, double, world=world)
        return runs[key]

    return find
