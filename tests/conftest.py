"""What every test runs under: the CPU, no network, nothing left behind outside its own folder."""

import functools
import os
import signal

import pytest
from hypothesis import settings

# Before torch, transformers or matplotlib are imported by a test module.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts the suite in the background lets it ignore SIGINT, which some tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite draws the same cases every time, so that it judges the change and not the day; `make test-slow`
# draws new ones. No case has a deadline: how long one takes says how busy the machine is.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("suite")


@pytest.fixture
def deaths_noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks every five seconds whether its loader processes live; here five times a second."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers

    sooner = functools.partialmethod(Workers._try_get_data, timeout=0.2)
    monkeypatch.setattr(Workers, "_try_get_data", sooner)
