"""Pushing and loading against a Hub server on loopback, from processes of their own."""

import hashlib
import json
import re
import shutil

import pytest
import yaml
from hub_checkpoints import commits, content, push, save_original, save_results
from hub_clients import Client, environment, finish, start
from hub_server import Hub
from huggingface_hub import ModelCard

from hf_mcsmoe.publishing import read_report, write_card, write_report

ALICE, READER, BOB = "hf_aliceMayWrite0123456789", "hf_aliceMayOnlyRead0123456", "hf_bobIsSomebodyElse012345"
USERS = {ALICE: ("alice", True), READER: ("alice", False), BOB: ("bob", True)}


@pytest.fixture(scope="module")
def hub():
    server = Hub(USERS)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    client = Client(environment(hub.endpoint, folder / "home", ALICE), folder)
    yield client
    client.close()


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory):
    """The original model with a tokenizer, in a folder whose name nobody needs to know."""
    return save_original(checkpoint("qwen3_moe"), tmp_path_factory.mktemp("secret-project") / "original")


@pytest.fixture(scope="module")
def results(source, tokens, tmp_path_factory):
    """Folders "mapped" (in shards, evaluated, with files that nobody wants) and "native" (one file) of the model."""
    return save_results(source, tokens, tmp_path_factory.mktemp("results"))


@pytest.fixture
def folder(results, tmp_path):
    """A copy of the mapped checkpoint, free to be changed."""
    return shutil.copytree(results / "mapped", tmp_path / "mapped")


@pytest.fixture(scope="module")
def pushed(hub, client, results):
    """What the repository holds after the mapped checkpoint was pushed."""
    client.run(push(results / "mapped", "alice/half"))
    return dict(hub.repositories["alice/half"].files())


def test_one_commit_holds_the_whole_checkpoint(hub, pushed, results):
    local = content(results / "mapped")
    assert commits(hub, "alice/half") == 1
    wanted = {name for name in local if not re.search(r"^(\.|checkpoint-3|runs)|\.(bin|tmp)$", name)}
    assert pushed.keys() == wanted | {".gitattributes"}
    assert {"README.md", "compression_report.json", "recipe.yaml", "modeling_hf_mcsmoe.py"} <= wanted
    shards = [name for name in wanted if name.endswith(".safetensors")]
    assert len(shards) > 2 and {"tokenizer.json", "generation_config.json"} <= wanted
    unchanged = wanted - {"README.md", "compression_report.json"}
    assert {name: pushed[name] for name in unchanged} == {name: local[name] for name in unchanged}


def test_no_folder_of_the_machine_leaves_it(pushed, source, results):
    assert str(source).encode() in (results / "mapped" / "compression_report.json").read_bytes()
    assert b"secret-project" not in (results / "mapped" / "config.json").read_bytes()  # Trainer sends it as it is
    for name, written in pushed.items():
        assert b"secret-project" not in written and str(results).encode() not in written, name
    assert json.loads(pushed["compression_report.json"])["base_model"] == "./original"
    assert json.loads(pushed["config.json"])["provenance"]["base_model"] == "./original"
    assert "the local model `original`" in pushed["README.md"].decode()


def test_the_card_is_for_the_repository_and_says_what_the_report_says(client, pushed):
    code = """
from huggingface_hub import ModelCard, hf_hub_download, metadata_load
card = ModelCard.load("alice/half")
card.validate()
result = [str(card), metadata_load(hf_hub_download("alice/half", "README.md"))]
"""
    text, metadata = client.run(code)
    assert text == pushed["README.md"].decode() and metadata == ModelCard(text).data.to_dict()
    assert text.count('from_pretrained("alice/half"') == 2 and "\n# half\n" in text
    report = json.loads(pushed["compression_report.json"])
    for time in ("before", "after"):
        assert f"| {report[f'total_parameters_{time}']:,} |" in text
        assert f"| {report[f'total_bytes_{time}']:,} (" in text
    errors = [layer["relative_error"] for layer in report["layers"]]
    assert f"{max(errors):.4g}" in text and f"{min(errors):.4g}" in text
    score = report["evaluation"]["overall"]
    increase, kl = score["loss_increase"], score["kl"]
    assert f"| {score['perplexity']:#.4g} [" in text and f"| {increase:+.4f} [" in text and f"| {kl:.4f} [" in text
    assert f"| {score['top1_agreement']:.1%} [" in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert recipe == yaml.safe_load(pushed["recipe.yaml"])


@pytest.mark.usefixtures("pushed")
def test_a_second_push_of_the_same_makes_no_commit(hub, client, results):
    before, sent = commits(hub, "alice/half"), hub.requests["PUT lfs"]
    url = client.run(push(results / "mapped", "alice/half", commit_message="again"))
    assert commits(hub, "alice/half") == before and hub.requests["PUT lfs"] == sent
    assert url.endswith(hub.repositories["alice/half"].refs["main"])
    pull = push(results / "mapped", "alice/half", create_pr=True).replace("commit_url", "pr_url")
    assert client.run(pull) is None and "refs/pr/1" not in hub.repositories["alice/half"].refs


LOGITS = "import torch\nresult = load({!r}{})(torch.arange(3, 40)[None]).logits.double().sum().item()\n"
LOAD = "from transformers import AutoModelForCausalLM\nload = AutoModelForCausalLM.from_pretrained\n"


@pytest.mark.usefixtures("pushed")
def test_what_is_pushed_loads_by_its_name(client, results):
    client.run(push(results / "native", "alice/plain"))
    for name, layout in (("alice/half", "mapped"), ("alice/plain", "native")):
        assert client.run(LOAD + LOGITS.format(name, "")) == client.run(
            LOAD + LOGITS.format(str(results / layout), "")
        )


@pytest.mark.slow
@pytest.mark.usefixtures("pushed")
def test_what_is_pushed_loads_in_fresh_processes(hub, client, results, tmp_path):
    client.run(push(results / "native", "alice/plain"))
    mapped = f"import hf_mcsmoe\n{LOAD}{LOGITS.format('alice/half', '')}print(result)\n"
    mapped += "from transformers import AutoTokenizer\ntokenizer = AutoTokenizer.from_pretrained('alice/half')\n"
    mapped += "inputs, model = tokenizer('w5 w6', return_tensors='pt'), load('alice/half')\n"
    mapped += "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=3)[0]))"
    plain = (
        f"import sys\n{LOAD}{LOGITS.format('alice/plain', '')}assert 'hf_mcsmoe' not in sys.modules\nprint(result)\n"
    )
    plain += f"{LOGITS.format('alice/half', ', trust_remote_code=True')}print(result)\n"
    nobody = environment(hub.endpoint, tmp_path)  # a public model needs no login
    running = [start(nobody, "-c", code) for code in (mapped, plain)]
    of_mapped, of_plain = (finish(process).splitlines() for process in running)
    expected = [client.run(LOAD + LOGITS.format(str(results / name), "")) for name in ("mapped", "native")]
    assert float(of_mapped[-2]) == expected[0] and of_mapped[-1].startswith("w5 w6 ")
    assert [float(line) for line in of_plain[-2:]] == expected[::-1]


def test_a_branch_is_made_and_main_stays(hub, client, pushed, folder):
    (folder / "notes.md").write_text("of a branch")
    client.run(push(folder, "alice/half", revision="trial", commit_message="On trial"))
    repository = hub.repositories["alice/half"]
    assert repository.files("trial") == {**pushed, "notes.md": b"of a branch"}
    assert "notes.md" not in repository.files("main")
    assert repository.messages[repository.refs["trial"]] == "On trial"


@pytest.mark.usefixtures("pushed")
def test_a_pull_request_by_somebody_else(hub, client, folder):
    (folder / "notes.md").write_text("proposed")
    by_bob = {"token": BOB}
    kind, message = client.fail(push(folder, "alice/half", **by_bob))
    assert kind == "PermissionError" and re.search(r"may not write to 'alice/half' \(403\).*create_pr=True", message)
    url = client.run(push(folder, "alice/half", create_pr=True, **by_bob).replace("commit_url", "pr_url"))
    assert url == f"{hub.endpoint}/alice/half/discussions/1"
    repository = hub.repositories["alice/half"]
    assert repository.files("refs/pr/1")["notes.md"] == b"proposed" and "notes.md" not in repository.files()
    (folder / "notes.md").write_text("improved")
    client.run(push(folder, "alice/half", revision="refs/pr/1"))
    assert repository.files("refs/pr/1")["notes.md"] == b"improved" and "refs/pr/2" not in repository.refs


def test_a_private_repository_is_not_there_for_others(hub, client, results):
    client.run(push(results / "native", "alice/hidden", private=True))
    assert hub.repositories["alice/hidden"].private and not hub.repositories["alice/half"].private
    kind, message = client.fail(push(results / "native", "alice/hidden", token=BOB, create_pr=True))
    assert kind == "PermissionError" and "403" in message
    load = "from transformers import AutoModelForCausalLM as auto\nauto.from_pretrained('alice/hidden', token={!r})"
    for token in (False, BOB):
        kind, message = client.fail(load.format(token))
        assert kind == "OSError" and "is not a local folder" in message
    client.run(load.format(ALICE))


def test_refusals_say_what_to_do_and_never_the_token(hub, client, results):
    folder = results / "native"
    before = {name: repository.refs.copy() for name, repository in hub.repositories.items()}
    unknown = "hf_nobodyKnowsThisOne01234"
    cases = [
        (
            {"repo": "alice/x", "token": unknown},
            "PermissionError",
            r"does not accept the access token.*\(401\).*auth login",
        ),
        ({"repo": "alice/x", "token": False}, "PermissionError", r"was given no access token.*\(401\)"),
        ({"repo": "alice/x", "token": READER}, "PermissionError", r"may not write to 'alice/x' \(403\)"),
        ({"repo": "nobody/x"}, "PermissionError", r"may not write to 'nobody/x' \(403\)"),
        ({"repo": "alice/half", "revision": "refs/pr/99"}, "FileNotFoundError", "no such branch or pull request"),
        ({"repo": "a/b/c"}, "ValueError", "repo_id is 'a/b/c', it must be 'owner/name'"),
        ({"repo": "alice/x", "create_pr": True, "revision": "y"}, "ValueError", "Leave one of them out"),
        ({"repo": "alice/x", "token": f"{ALICE}\n"}, "ValueError", "holds white space"),
    ]
    for options, kind, pattern in cases:
        answer = client.answer(push(folder, **options))
        assert answer["error"] == kind and re.search(pattern, answer["message"]), answer
        assert not any(token in answer["all"] for token in (ALICE, READER, unknown))
    assert before == {name: repository.refs for name, repository in hub.repositories.items()}


def test_a_cut_connection_is_tried_again_and_a_dead_one_goes_on_later(hub, client, pushed, results):
    shards = {name: pushed[name] for name in pushed if name.endswith(".safetensors")}
    oids = {name: hashlib.sha256(shard).hexdigest() for name, shard in shards.items()}
    stubborn = min(oids)
    hub.large_files.clear()
    hub.cuts.update({oids[stubborn]: 100, oids[max(oids)]: 1})
    no_wait = "import huggingface_hub.utils._http as http\nsleep, http.time.sleep = http.time.sleep, lambda _: None\n"
    kind, message = client.fail(no_wait + push(results / "mapped", "alice/cut"))
    assert kind == "ConnectionError" and re.search(r"'alice/cut' was interrupted.*Call it again", message)
    assert commits(hub, "alice/cut") == 0
    assert sorted(hub.large_files) == sorted(oid for name, oid in oids.items() if name != stubborn)
    hub.cuts.clear()
    sent = hub.requests["PUT lfs"]
    client.run(f"http.time.sleep = sleep\n{push(results / 'mapped', 'alice/cut')}")
    assert hub.requests["PUT lfs"] == sent + 1 and commits(hub, "alice/cut") == 1
    files = hub.repositories["alice/cut"].files()
    assert {name: files[name] for name in shards} == shards


def test_weights_of_an_earlier_model_are_replaced(hub, client, results):
    client.run(push(results / "native", "alice/changing"))
    client.run(push(results / "mapped", "alice/changing"))
    files = hub.repositories["alice/changing"].files()
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    client.run(push(results / "native", "alice/changing"))
    weights = [name for name in hub.repositories["alice/changing"].files() if name.startswith("model.safetensors")]
    assert weights == ["model.safetensors"] and commits(hub, "alice/changing") == 3


def test_a_card_that_was_changed_by_hand_goes_as_it_is(hub, client, folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Sizes", "My own words.\n\n## Sizes"))
    client.run(push(folder, "alice/edited"))
    assert hub.repositories["alice/edited"].files()["README.md"] == card.read_bytes()
    assert "was changed since it was written" in client.log.read_text()
    card.unlink()
    client.run(push(folder, "alice/edited"))
    assert b'from_pretrained("alice/edited"' in hub.repositories["alice/edited"].files()["README.md"]


def test_the_licence_of_a_base_model_on_the_hub_is_inherited(hub, client, folder):
    client.run(push(folder, "alice/base"))
    card = b"---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org/mine\n---\n# Base\n"
    hub.repositories["alice/base"].files()["README.md"] = card
    report = read_report(folder)
    for base, licence in (("alice/base", "mine"), ("alice/unknown", None)):
        write_report({**report, "base_model": base}, folder)
        write_card(folder)
        client.run(push(folder, "alice/heir"))
        written = ModelCard(hub.repositories["alice/heir"].files()["README.md"].decode())
        assert written.data.base_model == base and written.data.get("license_name") == licence
        assert ("which was not known" in written.text) == (licence is None)


def test_a_file_with_the_token_is_not_sent(hub, client, folder):
    (folder / "notes.txt").write_text(f"login with {ALICE}")
    kind, message = client.fail(push(folder, "alice/leak"))
    assert kind == "ValueError" and "notes.txt holds your access token" in message
    assert commits(hub, "alice/leak") == 0


def test_the_command_says_what_it_uploads(hub, client, results):
    run = "from typer.testing import CliRunner\nfrom hf_mcsmoe.cli import app\n"
    run += "done = CliRunner().invoke(app, {0!r}, env={{'COLUMNS': '120'}})\nresult = [done.exit_code, done.output]"
    folder = str(results / "mapped")
    code, text = client.run(run.format(["push", folder, "alice/by-command", "--private", "--commit-message", "Hello"]))
    repository = hub.repositories["alice/by-command"]
    assert code == 0 and repository.private and "Hello" in repository.messages.values()
    assert "model.safetensors.index.json" in text and "Not uploaded: " in text and "training_args.bin" in text
    assert f"It is there: {hub.endpoint}/alice/by-command/commit/{repository.refs['main']}" in text
    code, text = client.run(run.format(["push", folder, "alice/by-command", "--create-pr"]))
    assert code == 0 and "so there is no pull request" in text
    code, text = client.run(run.format(["push", folder, "nobody/x"]))
    assert code == 2 and "Error: The access token may not write" in text


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_a_model_object_brings_its_report_and_card(hub, client, results, layout):
    call = {"mapped": "model.push_to_hub(", "native": "hf_mcsmoe.push_to_hub(model, "}[layout]
    loading = f"""
import hf_mcsmoe
from hf_mcsmoe.loading import load_model, load_tokenizer
model, tokenizer = load_model({str(results / layout)!r}), load_tokenizer({str(results / layout)!r})
"""
    repo = f"alice/object-{layout}"
    client.run(f"{loading}{call}{repo!r}, tokenizer=tokenizer, tags='mine', max_shard_size='20KB')")
    client.run(f"{loading}tokenizer.push_to_hub({repo!r})")  # loads and saves the card
    assert commits(hub, repo) == 1
    files = hub.repositories[repo].files()
    card, report = ModelCard(files["README.md"].decode()), json.loads(files["compression_report.json"])
    assert "mine" in card.data.tags and f'from_pretrained("{repo}"' in card.text
    # The weights of an object may have changed since they were evaluated.
    assert "not evaluated" in card.text and "evaluation" not in report
    assert report["layers"] == read_report(results / layout)["layers"]
    statistics = "statistics/compression_statistics.safetensors"
    assert files[statistics] == (results / layout / statistics).read_bytes() and "plots/similarity.png" in files
    assert "model-00001-of" in " ".join(files) and "tokenizer.json" in files
    assert ("modeling_hf_mcsmoe.py" in files) == (layout == "mapped")
    assert not any(b"secret-project" in written for written in files.values())


def test_an_object_without_a_report_is_refused(hub, client, source):
    load = f"import hf_mcsmoe\nfrom hf_mcsmoe.loading import load_model\nmodel = load_model({str(source)!r})\n"
    kind, message = client.fail(f"{load}hf_mcsmoe.push_to_hub(model, 'alice/none')")
    assert kind == "ValueError" and "No report says how Qwen3MoeForCausalLM was compressed" in message
    assert client.fail("hf_mcsmoe.push_to_hub(tokenizer, 'alice/none')")[0] in ("TypeError", "NameError")
    assert "alice/none" not in hub.repositories


@pytest.mark.slow
def test_a_trainer_keeps_the_card(hub, client, results, tmp_path):
    code = f"""
import torch
from hf_mcsmoe.loading import load_model, load_tokenizer
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer
folder = {str(results / "mapped")!r}
model, tokenizer = load_model(folder).float(), load_tokenizer(folder)
rows = [{{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}}] * 4
args = DistillationArguments(output_dir={str(tmp_path / "out")!r}, max_steps=2, report_to="none", use_cpu=True,
    push_to_hub=True, hub_model_id="alice/trained", hub_token={ALICE!r}, hub_strategy="end", save_strategy="no")
trainer = DistillationTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
"""
    client.run(code)
    files = hub.repositories["alice/trained"].files()
    card, report = files["README.md"].decode(), json.loads(files["compression_report.json"])
    assert 'from_pretrained("alice/trained"' in card and "trained for 2 optimizer steps after the compression" in card
    assert "not evaluated" in card and "evaluation" not in report and "recipe.yaml" in files
    assert "training_args.bin" not in files and not any(ALICE.encode() in written for written in files.values())
    assert not any(b"secret-project" in written for written in files.values())
    assert "modeling_hf_mcsmoe.py" in files


@pytest.mark.slow
def test_any_trainer_can_keep_the_card(hub, client, results, source, tmp_path):
    code = f"""
from transformers import Trainer, TrainingArguments
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.publishing import CompressedModelCard
class KeepsCard(CompressedModelCard, Trainer):
    pass
def trainer(folder, output):
    args = TrainingArguments(output_dir=output, hub_model_id="alice/by-trainer", report_to="none", use_cpu=True)
    return KeepsCard(load_model(folder), args)
trainer({str(results / "native")!r}, {str(tmp_path / "compressed")!r}).push_to_hub(tags=["mine"], license="mit")
trainer({str(source)!r}, {str(tmp_path)!r}).create_model_card()
"""
    client.run(code)
    files = hub.repositories["alice/by-trainer"].files()
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("alice/by-trainer"' in card.text and "optimizer steps" not in card.text
    assert "mine" in card.data.tags and card.data.license == "mit"
    assert not any(b"secret-project" in written for written in files.values())
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()  # an original model gets Trainer's


def test_saving_can_push(hub, client, results, tmp_path):
    code = "from hf_mcsmoe.loading import load_model\n"
    code += f"load_model({str(results / 'mapped')!r}).save_pretrained({str(tmp_path)!r}, push_to_hub=True, "
    client.run(f"{code}repo_id='alice/saved', private=True)")
    repository = hub.repositories["alice/saved"]
    assert repository.private and b'from_pretrained("alice/saved"' in repository.files()["README.md"]
    assert commits(hub, "alice/saved") == 1


@pytest.mark.slow
def test_the_demo_publishes_what_another_process_evaluates(hub, tmp_path):
    login = environment(hub.endpoint, tmp_path / "home", ALICE)
    output = ("--output", tmp_path / "out")
    text = finish(start(login, "-m", "hf_mcsmoe", "demo", *output, "--push-to", "alice/demo"))
    assert f"It is there: {hub.endpoint}/alice/demo/commit/" in text
    card = hub.repositories["alice/demo"].files()["README.md"].decode()
    assert 'from_pretrained("alice/demo"' in card and "psf-2.0" in card and "top-1 agreement" in card
    elsewhere = environment(hub.endpoint, tmp_path / "other")
    found = finish(start(elsewhere, "-m", "hf_mcsmoe", "evaluate", "alice/demo", "--num-samples", 4, "--json"))
    assert json.loads(found[found.index("{") :])["overall"]["perplexity"] > 1


def test_no_token_was_written_anywhere(hub, client):
    """Last, so that it looks at what all other tests have left."""
    written = [client.log.read_text(), *client.answers]
    written += [
        c.decode("utf-8", "replace") for r in hub.repositories.values() for f in r.commits.values() for c in f.values()
    ]
    assert not [text for text in written for token in USERS if token in text]
