"""The report of a repository on a Hub server on loopback, from a process of its own."""

import pytest
from hub_checkpoints import push
from hub_clients import Client, environment
from hub_server import Hub

from hf_mcsmoe.publishing import PAGE_FILE, STATISTICS_FILE

TOKEN = "hf_aliceMayWrite0123456789"
COMMAND = """
from typer.testing import CliRunner
from hf_mcsmoe.cli import app
done = CliRunner().invoke(app, {arguments!r}, env={{"COLUMNS": "200"}})
result = [done.exit_code, done.output]
"""


@pytest.mark.slow
def test_the_report_of_a_repository_becomes_a_page_without_its_weights(checkpoint, stream, tmp_path):
    stream(checkpoint("qwen3_moe"), keep=0.5)
    hub = Hub({TOKEN: ("alice", True)})
    client = Client(environment(hub.endpoint, tmp_path / "home", TOKEN), tmp_path)
    try:
        client.run(push(tmp_path / "streamed", "alice/half"))
        assert {PAGE_FILE, STATISTICS_FILE} <= hub.repositories["alice/half"].files().keys()
        sent = hub.requests["GET resolve"]
        arguments = ["report", "alice/half", "--output", str(tmp_path / "pages")]
        code, text = client.run(COMMAND.format(arguments=arguments))
        assert code == 0 and "model.layers.1.mlp.experts" in text and "and 4 plots" in text
        assert (tmp_path / "pages" / "plots" / "similarity.png").is_file()
        assert hub.requests["GET resolve"] - sent == 2  # report and statistics
        code, text = client.run(COMMAND.format(arguments=["report", "alice/nothing-there"]))
        assert code == 2 and "alice/nothing-there" in text
    finally:
        client.close()
        hub.close()
