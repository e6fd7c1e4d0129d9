"""The filter encoder: the contract (T14), and the filter against its formula."""

from collections.abc import Callable

import lightning as L
import pytest
import torch

from lightning_sfubm.contracts import Encoder
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.checks import CHECKS
from lightning_sfubm.modules.encoders.filter_mixer import CausalFilter, FilterMixer
from lightning_sfubm.modules.sequential import SequentialRecommender


def loud_filter(max_length: int) -> CausalFilter:
    """A filter whose weights are not small beside rounding errors."""
    torch.manual_seed(0)
    layer = CausalFilter(4, max_length)
    torch.nn.init.normal_(layer.spectrum)
    return layer


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("max_length", [10, 11, 50])
def test_contract(check: str, max_length: int) -> None:
    torch.manual_seed(0)
    encoder = FilterMixer(8, num_layers=2, max_length=max_length).eval()
    for block in encoder.blocks:  # or the filters would hide behind the residual
        torch.nn.init.normal_(block.filter_layer.filter.spectrum)
    assert isinstance(encoder, Encoder)
    CHECKS[check](encoder, 1e-5)


@pytest.mark.parametrize("max_length", [6, 7])
def test_a_filter_is_a_weighted_sum_over_the_past(max_length: int) -> None:
    layer, x = loud_filter(max_length), torch.randn(3, 5, 4)
    kernel = layer.kernel()
    assert kernel.shape == (max_length, 4)
    expected = torch.stack([sum(kernel[j - i] * x[:, i] for i in range(j + 1)) for j in range(5)], 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_length", [1, 6, 7])
def test_the_newest_state_is_the_one_of_the_circular_filter(max_length: int) -> None:
    """FMLP-Rec's own formula on a full row, and on a shorter history padded to it."""
    layer, x = loud_filter(max_length), torch.randn(3, max_length, 4)
    x[1, : max_length // 2] = 0.0
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(layer.spectrum)
    circular = torch.fft.irfft(spectrum, n=max_length, dim=1, norm="ortho")
    torch.testing.assert_close(layer(x)[:, -1], circular[:, -1], atol=1e-5, rtol=1e-5)
    short = x[1:2, max_length // 2 :]
    torch.testing.assert_close(layer(short)[:, -1], circular[1:2, -1], atol=1e-5, rtol=1e-5)


def test_half_precision_inputs_keep_their_format() -> None:
    layer, x = loud_filter(6), torch.randn(2, 6, 4)
    filtered = layer(x.bfloat16())
    assert filtered.dtype == torch.bfloat16
    torch.testing.assert_close(filtered.float(), layer(x), atol=5e-2, rtol=5e-2)


def test_defaults_are_the_documented_ones() -> None:
    encoder = FilterMixer()
    assert (encoder.hidden_dim, encoder.num_layers, encoder.max_length, encoder.dropout) == (64, 2, 50, 0.2)
    assert encoder.blocks[0].feedforward[0].out_features == 256


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="max_length=0 must be at least 1"):
        CausalFilter(4, 0)
    with pytest.raises(ConfigError, match="FilterMixer: a history of 6 items is longer than max_length=5"):
        FilterMixer(8, max_length=5)(torch.zeros(1, 6, 8), torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ConfigError, match="CausalFilter: a history of 6 items is longer than max_length=5"):
        CausalFilter(8, 5)(torch.zeros(1, 6, 8))


def test_learns_and_reloads(synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path) -> None:
    """T32: far over chance (.05) without attention, and equal after a reload."""
    L.seed_everything(0, verbose=False)
    module = SequentialRecommender(FilterMixer(16, max_length=20, dropout=0.1), lr=1e-2)
    trainer = make_trainer(max_epochs=12)
    trainer.fit(module, synthetic)
    assert trainer.test(module, synthetic, verbose=False)[0]["test/hit@1"] > 0.3
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = SequentialRecommender.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    batch = next(iter(synthetic.test_dataloader()))
    torch.testing.assert_close(again.score_all(batch), module.eval().score_all(batch), rtol=0, atol=0)
