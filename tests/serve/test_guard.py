"""Under which names the server answers."""

import pytest

from serve.world import Client, server_here


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("127.0.0.1", "MyBox.local"), ("127.0.0.1", "mybox.local:8443"), ("0.0.0.0", "mybox.local")],
)
def test_a_host_is_allowed_however_it_is_written_and_wherever_it_listens(model, host, allowed):
    with server_here(model, host=host, hosts=(allowed,)) as (address, _):
        assert Client(address).ask("GET", "/healthz", None, Host="mybox.LOCAL:9000")[0] == 200
        assert Client(address).ask("GET", "/healthz", None, Host="evil.example")[0] == 421
