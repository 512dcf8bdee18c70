import pytest

from serve.world import server_here, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("serve") / "small.safetensors")


@pytest.fixture(scope="session")
def here(model):
    """A server in this process, shared by tests that leave it as it was: (address, service)."""
    with server_here(model) as made:
        yield made
