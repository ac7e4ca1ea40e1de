"""Where timm's pretrained weights come from: asked once, for a few seconds, before its clients ask again and again."""

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import torch
from huggingface_hub import constants
from timm.models._pretrained import PretrainedCfg

_SECONDS = 3


class Unavailable(RuntimeError):
    """Weights that cannot be reached and are not in the cache."""


def on_meta(device: torch.device | str | None) -> bool:
    """Whether parameters on this device, or on the default one, hold no values that weights could be loaded into."""
    return torch.empty(0, device=device).is_meta


@contextlib.contextmanager
def asked_once(name: str, config: PretrainedCfg | None) -> Iterator[None]:
    """Lets timm load the weights of a model that it knows by `config`.

    Where their place does not answer, huggingface_hub keeps to its cache for the length of the with-block.

    Raises:
        Unavailable: they are not in the cache either.
    """
    place = None if config is None or config.file or config.state_dict else _place(config)
    unreachable = place and _why_not(place)
    if unreachable and not config.hf_hub_id:
        raise Unavailable(unreachable)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        yield
    except OSError as error:
        if unreachable is None:
            raise
        raise Unavailable(f"{unreachable}, and its cache has no {name}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _place(config: PretrainedCfg) -> str | None:
    url = config.url if isinstance(config.url, str) else None
    return constants.ENDPOINT if config.hf_hub_id else url


def _why_not(place: str) -> str | None:
    """None if it answers within a few seconds, otherwise why not."""
    if constants.HF_HUB_OFFLINE:
        return f"{place} was not asked (HF_HUB_OFFLINE is set)"
    outcome: list[str | None] = [f"no answer within {_SECONDS} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=_SECONDS).close()
            outcome[0] = None
        except urllib.error.HTTPError as error:
            outcome[0] = f"it answers {error.code}" if error.code >= 500 else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            outcome[0] = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__

    thread = threading.Thread(target=ask, daemon=True)  # looking up the host's name knows no timeout
    thread.start()
    thread.join(_SECONDS)
    return outcome[0] and f"{place} cannot be reached ({outcome[0]})"
