"""The hand-off machine of both sides: how it ends, who may still read, and what is refused before a byte moves."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from kvtransfer.handoff import Refusal, SourceHandoff, TargetHandoff, recourse, refuse
from protocol.errors import IllegalMove
from protocol.kv import (
    DigestMode,
    Endpoint,
    FailurePolicy,
    FirstToken,
    HandoffKind,
    HandoffShard,
    KVHandoff,
    KVLayout,
    LayerGroup,
    LayerKind,
    Lease,
    Outcome,
    ShardRectangle,
    TransferError,
)
from protocol.lifecycle import HandoffState

pytestmark = pytest.mark.pure

FINGERPRINT = b"f" * 16


def make_layout(block_size: int = 16, head_dim: int = 4, num_layers: int = 2) -> KVLayout:
    group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=num_layers, num_kv_heads=1, head_dim=head_dim, dtype="float32")
    shard = ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=num_layers)
    return KVLayout(block_size_tokens=block_size, groups=(group,), shard=shard)


def make_handoff(num_tokens: int = 20, **changes: object) -> KVHandoff:
    shard = HandoffShard(
        worker_id="p0",
        rank=0,
        epoch=1,
        endpoint=Endpoint(),
        region_id=0,
        layout=make_layout(),
        block_ids=array("I", range(2)),
        generations=array("Q", [1, 1]),
        digest_mode=DigestMode.OFF,
        digests=b"",
    )
    handoff = KVHandoff(
        handoff_id="h",
        kind=HandoffKind.PREFILL,
        request_id="r",
        attempt=0,
        fingerprint=FINGERPRINT,
        token_ids=array("I", range(num_tokens)),
        layer_watermark=2,
        first_tokens=(FirstToken(choice=0, token_id=5),),
        lease=Lease(duration_s=30),
        shards=(shard,),
    )
    return replace(handoff, **changes)  # type: ignore[arg-type]


def refusal_of(handoff: KVHandoff, tokens: array[int] | None = None) -> TransferError | None:
    tokens = array("I", range(20)) if tokens is None else tokens
    refusal = refuse(handoff, fingerprint=FINGERPRINT, layout=make_layout(), token_ids=tokens)
    return refusal.error if refusal else None


def source() -> SourceHandoff:
    return SourceHandoff(handoff_id="h", block_ids=array("I", [1]), size_bytes=8, lease_s=30, expires_s=30)


def target() -> TargetHandoff:
    return TargetHandoff(handoff=make_handoff(), give_up_s=120, renew_interval_s=5, next_renewal_s=5, completed_s=0)


def outcome(error: TransferError | None = None) -> Outcome:
    return Outcome(num_blocks=2, size_bytes=16, duration_s=0.1, path="local", error=error)


def test_source_keeps_blocks_while_it_hears_of_the_target() -> None:
    """Seen to fail with `renew` not moving `expires_s`."""
    offer = source()
    assert not offer.expire_if_due(29.9)
    offer.renew(29.9)
    assert offer.state is HandoffState.RESERVED and not offer.expire_if_due(59.8)
    assert offer.expire_if_due(60.0) and offer.state is HandoffState.EXPIRED and not offer.is_open


@pytest.mark.parametrize("renewals", [0, 1, 2])
def test_acknowledgement_releases_whatever_was_heard_before(renewals: int) -> None:
    offer = source()
    for _ in range(renewals):
        offer.renew(1.0)
    offer.acknowledge()
    assert offer.state is HandoffState.RELEASED


def test_an_ended_offer_cannot_be_revived() -> None:
    offer = source()
    offer.drop()
    for late in (offer.acknowledge, offer.drop):
        with pytest.raises(IllegalMove):
            late()
    assert offer.state is HandoffState.FAILED


def test_target_walks_to_released() -> None:
    taken = target()
    taken.reserve()
    taken.pull(give_up_s=30)
    assert taken.is_pulling
    taken.finish_pull(outcome())
    assert taken.state is HandoffState.VERIFIED
    taken.release()
    assert taken.state is HandoffState.RELEASED


def test_nothing_is_decoded_from_a_copy_that_failed() -> None:
    """FAILED is final: no way leads from it to VERIFIED."""
    taken = target()
    taken.reserve()
    taken.pull(give_up_s=30)
    taken.finish_pull(outcome(TransferError.STALE_GENERATION))
    assert taken.state is HandoffState.FAILED and taken.refusal == Refusal(error=TransferError.STALE_GENERATION, detail="")
    with pytest.raises(IllegalMove):
        taken.finish_pull(outcome())


def test_a_pull_that_broke_off_may_be_made_again() -> None:
    """Seen to fail with `pull_again` not counting."""
    taken = target()
    taken.reserve()
    taken.pull(give_up_s=30)
    taken.pull_again(give_up_s=60)
    assert taken.is_pulling and taken.num_pulls == 2
    taken.finish_pull(outcome())
    taken.release()
    assert taken.give_up_s == 60
    with pytest.raises(IllegalMove):
        taken.pull_again(give_up_s=60)


@pytest.mark.parametrize("error", TransferError)
@pytest.mark.parametrize("num_pulls", [0, 1, 2])
def test_a_pull_is_made_again_once_and_only_where_the_source_may_have_the_blocks(error: TransferError, num_pulls: int) -> None:
    """All errors, before and after each pull. Seen to fail with STALE_GENERATION among those worth another pull."""
    curable = error in (TransferError.PEER_LOST, TransferError.TRUNCATED, TransferError.DIGEST_MISMATCH, TransferError.DEADLINE)
    again = FailurePolicy.RETRY if curable and num_pulls == 1 else FailurePolicy.RECOMPUTE
    assert recourse(FailurePolicy.RETRY, error, num_pulls=num_pulls) is again
    assert recourse(FailurePolicy.RECOMPUTE, error, num_pulls=num_pulls) is FailurePolicy.RECOMPUTE
    assert recourse(FailurePolicy.FAIL, error, num_pulls=num_pulls) is FailurePolicy.FAIL


def test_a_pull_needs_a_reservation() -> None:
    with pytest.raises(IllegalMove):
        target().pull(give_up_s=30)


def test_lease_is_renewed_six_times_before_it_could_run_out() -> None:
    taken = target()
    assert [t for t in range(0, 31) if taken.take_renewal(t)] == [5, 10, 15, 20, 25, 30]


def test_an_offer_that_matches_is_not_refused() -> None:
    assert refusal_of(make_handoff()) is None


def test_what_differs_is_refused_before_a_byte_moves() -> None:
    """Seen to fail, line by line, with each check of `refuse` taken out."""
    shard = make_handoff().shards[0]
    assert refusal_of(make_handoff(fingerprint=b"x" * 16)) is TransferError.REFUSED
    assert refusal_of(make_handoff(shards=())) is TransferError.REFUSED
    assert refusal_of(make_handoff(shards=(replace(shard, layout=make_layout(32)),))) is TransferError.TRUNCATED
    assert refusal_of(make_handoff(shards=(replace(shard, layout=make_layout(num_layers=1)),))) is TransferError.REFUSED
    assert refusal_of(make_handoff(shards=(replace(shard, layout=make_layout(head_dim=8)),))) is TransferError.REFUSED
    assert refusal_of(make_handoff(), array("I", [*range(19), 99])) is TransferError.REFUSED
    assert refusal_of(make_handoff(), array("I", range(19))) is TransferError.REFUSED
    assert refusal_of(make_handoff(layer_watermark=1)) is TransferError.TRUNCATED
    assert refusal_of(make_handoff(shards=(replace(shard, block_ids=array("I", [0])),))) is TransferError.TRUNCATED
    assert refusal_of(make_handoff(shards=(replace(shard, generations=array("Q", [1])),))) is TransferError.TRUNCATED
