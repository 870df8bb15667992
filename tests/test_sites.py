"""Where aggregates stand, what they see, and how wide the weight MLPs and FFNs are."""

import pytest

from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.connections.mudd import sites
from tests import models


@pytest.mark.parametrize(
  ("block", "dilation", "window", "expected"),
  [
    (3, 1, 0, (0, 1, 2, 3)),
    (4, 2, 0, (0, 2, 4)),
    (5, 2, 0, (1, 3, 5)),
    (8, 4, 0, (0, 4, 8)),
    (6, 1, 2, (0, 5, 6)),
    (6, 1, 1, (0, 6)),
    (1, 1, 8, (0, 1)),
    (9, 3, 4, (0, 6, 9)),
  ],
)
def test_sources(block, dilation, window, expected):
  assert sites.visible_sources(block, dilation=dilation, window=window) == expected


@pytest.mark.parametrize(
  ("ways", "sources", "expansion", "round_to", "expected"),
  [
    (4, 2, 1.0, 64, 64),
    (4, 16, 1.0, 64, 128),  # an exact multiple gains another 64, as released
    (4, 33, 1.0, 64, 192),
    (1, 33, 4.0, 64, 192),
    (4, 33, 1.0, 0, 132),
  ],
)
def test_hidden_width(ways, sources, expansion, round_to, expected):
  assert sites.hidden_width(ways, sources, expansion=expansion, round_to=round_to) == expected


@pytest.mark.parametrize(
  ("width", "layers"), [(2816, 24), (4096, 24), (5632, 24), (3584, 34), (4096, 42), (6912, 32), (11008, 32)]
)
def test_ffn_widths_keep_the_total_at_the_paper_sizes(width, layers):
  widths = ffn_widths.reallocated(width, layers, first=0.5, last=1.5, round_to=128)
  assert sum(widths) == layers * width
  assert all(w % 128 == 0 for w in widths)
  assert list(widths) == sorted(widths)
  for i, found in enumerate(widths, 1):  # Eq. 9
    assert abs(found - width * (0.5 * (layers - i) + 1.5 * (i - 1)) / (layers - 1)) <= 64


def test_ffn_widths_round_half_to_even():
  assert ffn_widths.reallocated(256, 6, first=0.5, last=1.5, round_to=128) == (128, 128, 256, 256, 384, 384)
  assert ffn_widths.reallocated(64, 3, first=0.5, last=1.5, round_to=64) == (0, 64, 128)


def test_last_aggregate_makes_the_residual_stream_only():
  found = connections.plan(models.config(mudd=True, base_num_decoder_layers=4))
  assert [found.sites[i].streams for i in (1, 2, 3, 4)] == ["qkvr", "qkvr", "qkvr", "r"]
  assert found.before(1) is None
  assert found.before(4) is found.sites[3]


def test_period():
  found = connections.plan(models.config(mudd=True, base_num_decoder_layers=5, mudd_block_period=2))
  assert sorted(found.sites) == [2, 4]
  assert found.sites[4].streams == "qkvr"


def test_streams_keep_the_paper_order():
  found = connections.plan(models.config(mudd=True, mudd_dense_streams="rkq"))
  assert found.sites[1].streams == "qkr"
  without_residual = connections.plan(models.config(mudd=True, mudd_dense_streams="qkv"))
  assert 3 not in without_residual.sites
