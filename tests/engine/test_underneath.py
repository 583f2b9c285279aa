"""What may change under an engine, times the ways in: noticed, harmless or refused, and never anything else.

The table of ``docs/registry.md`` says which; here each of its rows is done to an engine that has contexts, a session, a stream and files,
and everything it then answers is compared with a world that was new after the change.
"""

from __future__ import annotations

import copy
import inspect
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from conftest import CHATML, ROOT, TEXT, tiny_model, tiny_tokenizer
from forking import forked
from forking import outcome as said_by
from kvzip_memory import CompressedContext, IdentityMismatchError, KVzipEngine
from kvzip_memory.errors import KVzipError
from kvzip_memory.session import Session
from kvzip_memory.streaming import Stream

DOCS = ROOT / "docs" / "registry.md"
OTHER = "Another page tells of the boat: it is painted green, and its oars are kept in the shed. " * 3
MORE = "A later page: the shed's key hangs behind the stove."
FIRST, SECOND = "Which day is it?", "And the code?"
PROBE = [40, 50, 60]
ANSWER = {"max_new_tokens": 6}


@dataclass
class World:
    """An engine and what users have of it when something changes."""

    engine: KVzipEngine
    folder: Path
    context: CompressedContext
    session: Session
    stream: Stream
    file: Path


def made(model: Any, tokenizer: Any, folder: Path) -> World:
    engine = KVzipEngine(model, tokenizer, 0.5, cache_dir=folder)
    context = engine.load(TEXT, name="page")
    session = engine.session(context)
    session.ask(FIRST, **ANSWER)
    return World(engine, folder, context, session, engine.stream(context, FIRST, **ANSWER), context.save(folder / "page.safetensors"))


# -- ways in: what they give is a key, if they make or find a context, and what can be compared -------------------------------------

Given = tuple[str | None, Any]


def logits(engine: KVzipEngine, context: CompressedContext | None) -> Tensor:
    return engine.logits(context, PROBE)


def load(world: World) -> Given:
    context = world.engine.load(TEXT)
    return context.key, logits(world.engine, context)


def load_cut(world: World) -> Given:
    context = world.engine.load(TEXT, ratio=0.25)
    return context.key, logits(world.engine, context)


def load_marked(world: World) -> Given:
    content = [{"type": "text", "text": 2 * TEXT, "cache_control": {"type": "ephemeral"}}]
    context = world.engine.load_marked([{"role": "user", "content": content}])
    assert context is not None
    return context.key, logits(world.engine, context)


def extend(world: World) -> Given:
    context = world.engine.extend(world.context, MORE)
    return context.key, logits(world.engine, context)


def answer(world: World) -> Given:
    return None, world.engine.generate(world.context, FIRST, **ANSWER).text


def answer_logits(world: World) -> Given:
    return None, logits(world.engine, world.context)


def relevance(world: World) -> Given:
    spans = [(0, 40), (40, 80), (80, world.context.n_tokens)]
    return None, world.engine.relevance([(world.context, spans)], FIRST)[0]


def session_new(world: World) -> Given:
    return None, world.engine.session(world.context).ask(FIRST, **ANSWER).text


def answer_alone(world: World) -> Given:
    """Answers what the page says and asks: a stored beginning of the prompt may serve it."""
    return None, world.engine.generate(None, TEXT + FIRST, **ANSWER).text


def session(world: World) -> Given:
    return None, world.session.ask(SECOND, **ANSWER).text


def fold(world: World) -> Given:
    context = world.session.fold(keep=0)
    return context.key, logits(world.engine, context)


def join(world: World) -> Given:
    context = world.engine.join([world.context, world.context])
    return context.key, logits(world.engine, context)


def stream(world: World) -> Given:
    return None, "".join(world.stream)


def get(world: World) -> Given:
    context = world.engine.get("page")
    return context.key, logits(world.engine, context)


def reopen(world: World) -> Given:
    context = world.engine.open(world.file)
    return context.key, logits(world.engine, context)


def store(world: World) -> Given:
    """Of a text that is new, and what another engine then finds."""
    key = world.engine.load(OTHER).key
    world.engine.close()
    another = KVzipEngine(copy.deepcopy(world.engine.model), copy.deepcopy(world.engine.tokenizer), 0.5, cache_dir=world.folder)
    found = another.load(OTHER)
    assert found.key == key, "another engine would not find it"
    return key, logits(another, found)


#: By the columns of the table.
COLUMNS: dict[str, list[Callable[[World], Given]]] = {
    "load": [load, load_cut, load_marked],
    "extend": [extend, join],
    "answer": [answer, answer_logits, relevance, session_new],
    "answer without a context": [answer_alone],
    "stream begun before": [stream],
    "session": [session],
    "fold": [fold],
    "get": [get],
    "open": [reopen],
    "store": [store],
}
WAYS = {way: column for column, ways in COLUMNS.items() for way in ways}

# -- what may change -------------------------------------------------------------------------------------------------------------


def optimizers() -> Iterator[tuple[str, Callable[[World], None]]]:
    """Each of torch, in every implementation it has on this device."""
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass):
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            known = inspect.signature(kind).parameters
            for flavour in ({}, {"foreach": True}, {"fused": True}):
                if flavour.keys() <= known.keys():
                    yield f"{name}({', '.join(f'{k}={v}' for k, v in flavour.items())})", partial(step, kind=kind, **flavour)


def step(world: World, kind: Any, **flavour: Any) -> None:
    weights = [p for p in world.engine.model.parameters() if p.ndim == 2]  # Muon takes no others
    optimizer = kind(weights, lr=0.05, **flavour)
    for weight in weights:
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
        weight.grad = grad.to_sparse() if "Sparse" in kind.__name__ else grad
    optimizer.step(lambda: torch.tensor(1.0))
    optimizer.zero_grad()


def one_weight(model: nn.Module) -> Tensor:
    return model.get_parameter("model.layers.1.mlp.down_proj.weight")


def write_data(world: World) -> None:
    one_weight(world.engine.model).data.mul_(1.5)


def write_numpy(world: World) -> None:
    one_weight(world.engine.model).detach().numpy()[:] *= 1.5


def write_inference(world: World) -> None:
    with torch.inference_mode():
        one_weight(world.engine.model).mul_(1.5)


def load_weights(world: World) -> None:
    world.engine.model.load_state_dict(tiny_model(seed=1).state_dict())


def replace_weight(world: World) -> None:
    world.engine.model.model.layers[1].mlp.down_proj.weight = nn.Parameter(1.5 * one_weight(world.engine.model).detach())


def buffer(world: World) -> None:
    world.engine.model.model.rotary_emb.inv_freq.mul_(1.5)


def scaling(world: World) -> None:
    world.engine.model.model.layers[1].self_attn.scaling *= 3


def epsilon(world: World) -> None:
    world.engine.model.model.norm.variance_epsilon = 1.0


def adapter(world: World) -> None:
    world.engine.model.model.layers[0].mlp.active_adapters = ["b"]


def dtype(world: World) -> None:
    world.engine.model.to(torch.bfloat16)


def device(world: World) -> None:
    world.engine.model.to("meta")


def train(world: World) -> None:
    world.engine.model.train()


def train_a_part(world: World) -> None:
    world.engine.model.model.layers[1].train()


def checkpointing(world: World) -> None:
    world.engine.model.gradient_checkpointing_enable()
    world.engine.model.train()


def frozen(world: World) -> None:
    world.engine.model.requires_grad_(False)


def compiled(world: World) -> None:
    world.engine.model.compile(backend="eager")


def attention(world: World) -> None:
    world.engine.model.set_attn_implementation("eager")


def use_cache(world: World) -> None:
    world.engine.model.config.use_cache = False


def truncation(world: World) -> None:
    world.engine.tokenizer(["long " * 50, "short"], truncation=True, max_length=4, padding=True)


def added_token(world: World) -> None:
    world.engine.tokenizer.add_tokens([AddedToken("donkey", normalized=False)])


def special_token(world: World) -> None:
    world.engine.tokenizer.add_special_tokens({"additional_special_tokens": ["<|code|>"]})


def template(world: World) -> None:
    world.engine.tokenizer.chat_template = CHATML.replace("im_start|>'", "im_start|> '")


def generation(world: World) -> None:
    world.engine.model.generation_config.repetition_penalty = 1.5
    world.engine.model.generation_config.suppress_tokens = [105, 110]


def clock(days: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400 * days)


def folder_gone(world: World) -> None:
    shutil.rmtree(world.folder / "contexts")


def index_gone(world: World) -> None:
    shutil.rmtree(world.folder / "contexts" / "index")


def blobs_gone(world: World) -> None:
    shutil.rmtree(world.folder / "contexts" / "blobs")


def other_directory(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def default_dtype(world: World, request: pytest.FixtureRequest) -> None:
    torch.set_default_dtype(torch.bfloat16)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))


def default_device(world: World, request: pytest.FixtureRequest) -> None:
    torch.set_default_device("meta")
    request.addfinalizer(lambda: torch.set_default_device(None))


def autocast(world: World, request: pytest.FixtureRequest) -> None:
    context = torch.autocast("cpu", torch.bfloat16)
    context.__enter__()
    request.addfinalizer(lambda: context.__exit__(None, None, None))


def inference(world: World, request: pytest.FixtureRequest) -> None:
    context = torch.inference_mode()
    context.__enter__()
    request.addfinalizer(lambda: context.__exit__(None, None, None))


def seed(world: World) -> None:
    torch.manual_seed(5)


CHANGES: dict[str, dict[str, Callable[..., None]]] = {
    "weights, by an optimizer of torch": dict(optimizers()),
    "weights, by hand": {f.__name__: f for f in (write_data, write_numpy, write_inference, load_weights, replace_weight)},
    "a buffer, a module's own number": {f.__name__: f for f in (buffer, scaling, epsilon)},
    "an adapter": {"switched": adapter},
    "dtype": {"bfloat16": dtype},
    "device": {"meta": device},
    "`train()`": {f.__name__: f for f in (train, train_a_part, checkpointing)},
    "`requires_grad_`, `compile()`, attention, `use_cache`": {f.__name__: f for f in (frozen, compiled, attention, use_cache)},
    "the tokenizer's truncation and padding": {"both": truncation},
    "the tokenizer's tokens": {f.__name__: f for f in (added_token, special_token)},
    "the chat template": {"set": template},
    "`generation_config`": {"penalty": generation},
    "the clock": {"a day back": partial(clock, -1), "a day ahead": partial(clock, 1)},
    "the folder, deleted": {"whole": folder_gone},
    "the folder's index or files, deleted": {f.__name__: f for f in (index_gone, blobs_gone)},
    "torch's defaults and modes, the directory, the seed": {
        f.__name__: f for f in (default_dtype, default_device, autocast, inference, other_directory, seed)
    },
}


def model_with_dropout() -> Any:
    """Small, with everything that rows change: dropout, a stand-in for an adapter's layer."""
    model = tiny_model(attention_dropout=0.4)
    mlp = model.model.layers[0].mlp
    mlp.active_adapters, mlp.scaling, mlp.disable_adapters, mlp.merged = ["a"], {"a": 1.0}, False, False
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, nn.Dropout(0.4))
    return model.eval()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[[World], Given], Given]:
    """What each way gives in a world in which nothing changes."""
    untouched = made(model_with_dropout(), tiny_tokenizer(), tmp_path_factory.mktemp("untouched"))
    return {way: way(untouched) for way in WAYS}


def documented() -> dict[str, dict[str, str]]:
    """Row by row, what the docs say of each way in."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    first = next(i for i, line in enumerate(lines) if line.startswith("| what changes"))
    ways, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:])
    table = {}
    for row in rows[1:]:
        if len(row) != len(ways):
            break
        table[row[0]] = dict(zip(ways[1:], row[1:], strict=True))
    return table


def same(one: Given, other: Given) -> bool:
    (key, given), (other_key, expected) = one, other
    if isinstance(given, Tensor):
        return key == other_key and given.shape == expected.shape and torch.allclose(given.float(), expected.float(), atol=1e-4, rtol=1e-4)
    return key == other_key and bool(given == expected)


def outcome(way: Callable[[World], Given], expected: str, world: World, fresh: World, before: Given) -> str:
    """``harmless``, as if nothing had changed; ``noticed``, as in a world that is new after it, or told so; ``refused``."""
    try:
        given = way(world)
    except IdentityMismatchError:
        return "noticed"
    except KVzipError as error:
        return "refused" if re.search(r"[;:,] \w+", str(error)) else f"{error} names no way out"
    except Exception as error:
        return f"raw {error!r}"[:200]
    fits = [word for word, other in (("harmless", before), ("noticed", way(fresh))) if same(given, other)]
    return expected if expected in fits else f"WRONG, {fits}"


def test_the_table_names_all_ways_and_changes() -> None:
    table = documented()
    assert list(table) == [*CHANGES, "`os.fork()`"]
    assert all(list(row) == list(COLUMNS) for row in table.values())


@pytest.mark.parametrize(("row", "change"), [(row, change) for row, changes in CHANGES.items() for change in changes])
def test_what_changes_is_noticed_harmless_or_refused(
    row: str,
    change: str,
    before: dict[Callable[[World], Given], Given],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    def changed(world: World) -> World:
        fixtures = {"monkeypatch": monkeypatch, "request": request, "tmp_path": tmp_path}
        apply = CHANGES[row][change]
        apply(world, **{name: value for name, value in fixtures.items() if name in inspect.signature(apply).parameters})
        return world

    model, tokenizer = model_with_dropout(), tiny_tokenizer()
    twins = copy.deepcopy((model, tokenizer))
    world = made(model, tokenizer, tmp_path / "world")
    world.engine.registry.flush()
    changed(world)
    if row == "`generation_config`":  # what was said before it belongs to the conversation
        fresh = changed(made(*twins, tmp_path / "fresh"))
    else:
        fresh = made(*copy.deepcopy((model, tokenizer)), tmp_path / "fresh") if row != "device" else world
    expected = {way: documented()[row][column] for way, column in WAYS.items()}
    found = {way: outcome(way, expected[way], world, fresh, before[way]) for way in WAYS}
    assert {way.__name__: word for way, word in found.items() if word != expected[way]} == {}


@pytest.mark.parametrize("way", WAYS)
def test_after_a_fork_it_is_refused(way: Callable[[World], Given], tmp_path: Path) -> None:
    world = made(tiny_model(), tiny_tokenizer(), tmp_path)
    world.engine.registry.flush()

    def answered() -> str:
        try:
            way(world)
        except KVzipError as error:
            return f"refused: {error}"
        return "answered"

    said = said_by(forked(answered), 20)
    assert said.startswith("refused: ")
    assert "each process" in said
    assert documented()["`os.fork()`"][WAYS[way]] == "refused"
    assert way(world)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_the_caller_is_not_that_of_a_model_whatever_its_dtype(cast: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    mine, theirs = (made(tiny_model().to(dtype), tiny_tokenizer(), tmp_path / name) for name in ("mine", "theirs"))
    for way in WAYS:
        expected = way(theirs)
        with torch.autocast("cpu", cast):
            given = way(mine)
        assert same(given, expected), way.__name__
