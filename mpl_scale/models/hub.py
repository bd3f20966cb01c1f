"""Weights that timm publishes on the Hugging Face hub: which repository, and where its file is in the hub's cache.

The cache is asked first and then the network, so a run that continues reads the file that it started from. The cache's
place is that of huggingface_hub: HF_HUB_CACHE, or hub/ below HF_HOME; HF_HUB_OFFLINE=1 asks no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mpl_scale.config.schema import NetworkConfig
from mpl_scale.models.registry import MODELS, find_builder

TIMM = "timm"
"""The word for `weights`."""
FILE_NAME = "model.safetensors"
_SHOWN = 5


def repository(network: NetworkConfig, *, field: str) -> str:
    """The repository with the weights that `network.name` names, with or without a tag: "timm/resnet18.a1_in1k".

    Raises ValueError: the model is not timm's, its tag is unknown, or nothing is published for it.
    """
    find_builder(network.name, field=f"{field}.name")
    import timm  # seconds

    architecture, _, tag = network.name.partition(".")
    own = network.name in MODELS
    published = [] if own else [name for name in timm.list_pretrained(f"{architecture}.*") if _repository(name)]
    if not own and (not tag or network.name in published) and (found := _repository(network.name)) is not None:
        return found
    more = f" and {len(published) - _SHOWN} more" if len(published) > _SHOWN else ""
    others = f"name to one of {', '.join(published[:_SHOWN])}{more}, or " if published else ""
    raise ValueError(
        f"{field}.weights = {TIMM}: timm has no weights of {network.name} on the hub; set {others}weights to a "
        f"{FILE_NAME}"
    )


def _repository(name: str) -> str | None:
    import timm

    config = timm.get_pretrained_cfg(name)
    return config.hf_hub_id if config is not None and not config.hf_hub_filename else None


def find_file(network: NetworkConfig, *, field: str) -> Path:
    """The file in the cache, downloaded if it is not there: by one process of those that share the cache.

    Raises ValueError as `repository`, or where there is no such file here nor on the hub: one line that says where it
    would be.
    """
    named = repository(network, field=field)
    if (found := _cached(named)) is not None:
        return found
    folder, (repo, revision) = _folder(named), _split(named)
    try:
        with _first(folder) as first:
            if (found := _cached(named)) is not None:
                return found
            if not first:
                raise FileNotFoundError("another process has tried just now")
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(repo, FILE_NAME, revision=revision))
    except Exception as error:  # of the network's libraries: no connection, no such repository, a full disk
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(
            f"{field}.weights = timm: {folder}/snapshots/COMMIT/model.safetensors is not there, and {repo} cannot be "
            f"downloaded ({why}); run `hf download {repo} model.safetensors` on a machine with a network and bring "
            f"{folder.name} here, or set weights to a file"
        ) from error


@contextmanager
def _first(folder: Path) -> Iterator[bool]:
    """Alone among the processes that share the cache; whether none of them was here when this one came."""
    from huggingface_hub.utils import WeakFileLock

    lock = folder.parent / ".locks" / folder.name / "mpl_scale.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=0.1))
            first = True
        except TimeoutError:
            held.enter_context(WeakFileLock(lock))
            first = False
        yield first


def _cached(named: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repo, revision = _split(named)
    found = try_to_load_from_cache(repo, FILE_NAME, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _folder(named: str) -> Path:
    """Where the cache has a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{_split(named)[0].replace('/', '--')}"


def _split(named: str) -> tuple[str, str | None]:
    """Repository and revision, of timm's OWNER/NAME or OWNER/NAME@REVISION."""
    repo, _, revision = named.partition("@")
    return repo, revision or None
