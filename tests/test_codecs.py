"""One conformance suite: every codec with every byte format obeys the same laws."""

import dataclasses
import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from thinpipe.compress import registry
from thinpipe.compress.byte_format import CodecError, Direction, Key, Payload
from thinpipe.compress.codec_interface import BoundaryContext, Decoder, Encoder, StageContext
from thinpipe.compress.identity import IdentityCodec
from thinpipe.compress.registry import codec_names, format_names, parse_codec, parse_format

FORMATS = format_names()
# largest |z - unpack(pack(z))| in parts of the largest |z|, (FORWARD, BACKWARD)
TOLERANCE = {
    "fp64": (0.0, 0.0),
    "fp32": (2**-24, 2**-24),
    "bf16": (2**-8, 2**-8),
    "int8": (0.5 / 127 * (1 + 2**-8), 1 / 127 * (1 + 2**-7)),  # half a step, a step; the scale itself is rounded
    "int4": (0.5 / 7 * (1 + 2**-8), 1 / 7 * (1 + 2**-7)),
    "int3": (0.5 / 3 * (1 + 2**-8), 1 / 3 * (1 + 2**-7)),
    "int2": (0.5 * (1 + 2**-8), 1 + 2**-7),
}
# formats whose error depends on a table that they learn; their own laws are in their own tests
LEARNED = ["rvq", "transform"]
# formats that keep some numbers of each token and send nothing of the others: as bf16 what is kept, or zero
DROPPING = ["columns", "mask", "topk"]
EXACT = [name for name in FORMATS if name not in LEARNED + DROPPING]
IDEMPOTENT = [*EXACT, "columns", "topk"]  # of a mask, what arrives is larger than what was sent
UNIT_ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8}
SMALLEST = 2.0**-125  # absolute error that a scale of at least 2**-126 may add
CONTEXT = BoundaryContext(seed=3, boundary=1, width=24, vocab_size=64)
# options that suit so small a model, for codecs and formats whose defaults do not
SMALL = {
    "mapl": "mapl:r=6,anchors=factorized,table=1,every=1",
    "resbm": "resbm:b=6,mid=9,anchors=factorized,table=1",
    "rvq": "rvq:groups=1,codes=5,levels=2",
    "ssn": "ssn:k=6",
}
SMALL |= {name: f"{name}:k=2" for name in DROPPING}


laws = settings(deadline=None, max_examples=40)
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple) | st.sampled_from(
    [(128,), (127,), (129,), (2, 3, 64), (257,), (4, 64)]
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
directions = st.sampled_from(Direction)
magnitudes = st.sampled_from([0.0, 1e-44, 1e-39, 1e-20, 1e-3, 1.0, 1e4, 1e30])


def key(direction=Direction.FORWARD, seed=7, boundary=0, step=3, microbatch=1):
    return Key(seed=seed, boundary=boundary, direction=direction, step=step, microbatch=microbatch)


def tensor(shape, dtype=torch.float32, magnitude=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
    if z.numel() > 3:
        z.view(-1)[1] = 0.0
        z.view(-1)[3] *= 50  # an outlier
    return z.to(dtype)


def made(name, z=None):
    """A format that can pack tensors like `z`: one that learns has learned from it."""
    fmt = parse_format(SMALL.get(name, name))
    prepare(fmt, tensor((3, 70)) if z is None else z)
    return fmt


def prepare(fmt, z):
    if fmt.id in LEARNED:
        fmt.learn(z, key(step=0))
        fmt.use_table(fmt.master)


def packable(name, shape):
    """Whether the format takes tensors of this shape: a codebook needs tokens of some width, and k that of k."""
    least = 1 if name in LEARNED else 2 if name in DROPPING else None
    return least is None or (len(shape) > 0 and shape[-1] >= least)


def round_trip(fmt, z, k, dtype=None):
    return fmt.unpack(fmt.pack(z, k), shape=tuple(z.shape), dtype=dtype or z.dtype, key=k)


@pytest.mark.parametrize("name", FORMATS)
class TestFormatLaws:
    @laws
    @given(shape=shapes, dtype=dtypes, direction=directions, magnitude=magnitudes, seed=st.integers(0, 5))
    def test_round_trip_has_shape_dtype_length_and_bounded_error(self, name, shape, dtype, direction, magnitude, seed):
        assume(packable(name, shape))
        z = tensor(shape, dtype, magnitude, seed)
        fmt, before = made(name, z), z.clone()
        payload = fmt.pack(z, key(direction))
        back = fmt.unpack(payload, shape=shape, dtype=dtype, key=key(direction))
        assert payload.codec == name
        assert payload.header == {"shape": list(shape)}
        assert type(payload.body) is bytes
        assert len(payload.body) == fmt.body_bytes(shape)
        assert back.shape == shape
        assert back.dtype == dtype
        assert not back.requires_grad
        assert torch.equal(z, before)
        if z.numel() and name in EXACT:
            peak = z.double().abs().max().item()
            bound = peak * (TOLERANCE[name][direction] + UNIT_ROUNDOFF[dtype]) * (1 + 1e-5) + SMALLEST
            assert (z.double() - back.double()).abs().max().item() <= bound
        if name in DROPPING:
            gain = shape[-1] / 2 if name == "mask" else 1.0
            error = (gain * z.double() - back.double()).abs()
            kept = error <= gain * z.double().abs() * (2**-8 + UNIT_ROUNDOFF[dtype]) * (1 + 1e-5) + SMALLEST
            assert bool((kept | (back == 0)).all())
            if z.numel():
                assert bool((kept.sum(dim=-1) >= 2).all())  # k of each token

    @pytest.mark.parametrize("direction", Direction)
    def test_bytes_depend_on_tensor_and_key_alone(self, name, direction):
        z, other = tensor((3, 5, 40)), tensor((3, 5, 40), seed=1)
        payload = made(name, z).pack(z, key(direction))
        fmt = made(name, z)
        fmt.pack(other, key(direction, microbatch=2))  # another message in between
        assert fmt.pack(z, key(direction)) == payload
        strided = z.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        assert fmt.pack(strided, key(direction)) == payload
        assert fmt.pack(z.double(), key(direction)).body == payload.body
        assert fmt.pack(other, key(direction)) != payload

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("direction", Direction)
    def test_bytes_are_equal_on_cuda(self, name, direction):
        z = tensor((5, 1001))
        fmt = made(name, z)
        payload = fmt.pack(z, key(direction))
        if name in LEARNED:  # which code is nearest is the encoder's choice alone; what comes of it is not
            fmt.use_table(fmt.master.cuda())
            assert len(fmt.pack(z.cuda(), key(direction)).body) == len(payload.body)
        else:
            assert fmt.pack(z.cuda(), key(direction)) == payload
        there = fmt.unpack(payload, shape=(5, 1001), dtype=torch.float32, device="cuda", key=key(direction))
        here = made(name, z).unpack(payload, shape=(5, 1001), dtype=torch.float32, key=key(direction))
        close = 1e-5 if name == "transform" else 0.0  # a matrix product
        torch.testing.assert_close(there.cpu(), here, rtol=close, atol=close)

    def test_threads_do_not_change_bytes(self, name):
        z, threads = tensor((2, 200, 256)), torch.get_num_threads()
        fmt = made(name, z)
        try:
            bodies = set()
            for count in (1, 2):
                torch.set_num_threads(count)
                bodies.add(fmt.pack(z, key(Direction.BACKWARD)).body)
        finally:
            torch.set_num_threads(threads)
        assert len(bodies) == 1

    def test_unpacked_memory_is_its_own(self, name):
        fmt = made(name, tensor((4, 40)))
        payload = fmt.pack(tensor((4, 40)), key())
        body = bytes(bytearray(payload.body))
        first = fmt.unpack(payload, shape=(4, 40), dtype=torch.float32, key=key())
        second = fmt.unpack(payload, shape=(4, 40), dtype=torch.float32, key=key())
        kept = second.clone()
        first.fill_(5.0)
        assert payload.body == body
        assert torch.equal(second, kept)

    def test_pack_ignores_the_graph(self, name):
        z = tensor((4, 40)).requires_grad_()
        fmt = made(name, z)
        assert fmt.pack(z * 1, key()) == fmt.pack(z.detach(), key())

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("at", [0, 200])
    def test_refuses_to_send_what_is_not_finite(self, name, bad, at):
        z = tensor((3, 70))
        z.view(-1)[at] = bad
        with pytest.raises(CodecError) as error:
            made(name).pack(z, key(Direction.BACKWARD, boundary=2, step=11, microbatch=5))
        text = str(error.value)
        assert f"value {bad} at element {at} of BACKWARD tensor of boundary 2, step 11, microbatch 5" in text

    def test_refuses_to_send_what_overflows(self, name):
        z = torch.tensor([1.0, 1e39], dtype=torch.float64)
        if name == "fp64":
            assert torch.equal(round_trip(parse_format(name), z, key()), z)
            return
        fmt = made(name, torch.ones(2))
        with pytest.raises(CodecError, match=f"1e\\+39 at element 1 .* overflows {name}"):
            fmt.pack(z, key())

    def test_refuses_what_is_not_finite_in_the_local_dtype(self, name):
        fmt = made(name, torch.tensor([1.0, 1e30]))
        payload = fmt.pack(torch.tensor([1.0, 1e30]), key())
        with pytest.raises(CodecError, match="float16"):
            fmt.unpack(payload, shape=(2,), dtype=torch.float16, key=key())

    @pytest.mark.parametrize("change", [-1, 1, -10, 100, None])
    def test_refuses_another_length(self, name, change):
        fmt = made(name)
        payload = fmt.pack(tensor((3, 70)), key())
        body = b"" if change is None else payload.body[:change] if change < 0 else payload.body + bytes(change)
        with pytest.raises(CodecError, match=f"has {len(body)} bytes, expected {len(payload.body)}"):
            fmt.unpack(dataclasses.replace(payload, body=body), shape=(3, 70), dtype=torch.float32, key=key())

    def test_refuses_another_format(self, name):
        fmt = made(name)
        payload = fmt.pack(tensor((3, 70)), key())
        for other in [*FORMATS, "", "x" * 10_000]:
            if other != name:
                with pytest.raises(CodecError, match=f"agreed was '{name}'") as error:
                    fmt.unpack(dataclasses.replace(payload, codec=other), shape=(3, 70), dtype=torch.float32, key=key())
                assert len(str(error.value)) < 200

    @pytest.mark.parametrize("shape", [(70, 3), (210,), (3, 71), (10**12, 10**6)])
    def test_refuses_another_shape_and_prints_both(self, name, shape):
        fmt = made(name)
        payload = fmt.pack(tensor((3, 70)), key())
        with pytest.raises(CodecError) as error:
            fmt.unpack(payload, shape=shape, dtype=torch.float32, key=key())
        assert "[3, 70]" in str(error.value)
        assert str(list(shape)) in str(error.value)

    @pytest.mark.parametrize(
        "header", [{}, None, [3, 70], {"shape": None}, {"shape": "3,70"}, {"shape": [[3], 70]}, {"shape": [1] * 10**5}]
    )
    def test_refuses_a_malformed_header(self, name, header):
        fmt = made(name)
        payload = dataclasses.replace(fmt.pack(tensor((3, 70)), key()), header=header)
        with pytest.raises(CodecError) as error:
            fmt.unpack(payload, shape=(3, 70), dtype=torch.float32, key=key())
        assert len(str(error.value)) < 300

    @laws
    @given(data=st.data(), count=st.integers(0, 300), dtype=dtypes)
    def test_garbage_gives_finite_values_or_a_codec_error(self, name, data, count, dtype):
        shape = (count, 2)
        fmt = made(name, tensor((9, 2)))
        size = fmt.body_bytes(shape)
        seed = data.draw(st.integers(0, 2**32))
        body = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        if data.draw(st.booleans()):  # plausible exponents, so that garbage gets further
            body = body.clamp_(1, 0x7E)
        payload = Payload(codec=name, header={"shape": list(shape)}, body=body.numpy().tobytes())
        try:
            values = fmt.unpack(payload, shape=shape, dtype=dtype, key=key())
        except CodecError:
            return
        assert values.shape == shape
        assert bool(values.isfinite().all())

    @laws
    @given(body=st.binary(max_size=40))
    @example(body=b"")
    def test_any_bytes_raise_nothing_but_codec_error(self, name, body):
        fmt = made(name, tensor((5,)))
        payload = Payload(codec=name, header={"shape": [5]}, body=body)
        try:
            values = fmt.unpack(payload, shape=(5,), dtype=torch.float32, key=key())
        except CodecError:
            return
        assert len(body) == fmt.body_bytes((5,))
        assert bool(values.isfinite().all())

    def test_state_survives_a_checkpoint(self, name):
        z = tensor((4, 40))
        fmt, copy = made(name, z), parse_format(SMALL.get(name, name))
        fmt.pack(z, key())
        copy.load_state_tensors(fmt.state_tensors())
        if name in LEARNED:
            copy.use_table(copy.master)  # what was shipped is the dictionary's to keep
        assert copy.pack(z, key(microbatch=2)) == fmt.pack(z, key(microbatch=2))
        found = {n: (t.shape, t.dtype) for n, t in fmt.state_tensors().items()}
        assert found == {n: (t.shape, t.dtype) for n, t in fmt.state_layout((4, 40), 1).items()}
        assert parse_format(name).state_tensors() == fmt.state_layout((4, 40), 0) == {}
        with pytest.raises(CodecError, match="nonsense"):
            copy.load_state_tensors({**fmt.state_tensors(), "nonsense": torch.zeros(1)})

    def test_a_table_is_learned_or_asked_for_in_vain(self, name):
        fmt, z = parse_format(SMALL.get(name, name)), tensor((4, 40))
        table = fmt.table(40)
        assert not fmt.has_started
        assert fmt.measures() == {}
        if table is None:
            for ask in (
                lambda: fmt.master,
                lambda: fmt.usage,
                lambda: fmt.use_table(torch.zeros(24, 4)),
                lambda: fmt.learn(z, key()),
            ):
                with pytest.raises(CodecError, match="no learned table"):
                    ask()
            return
        with pytest.raises(CodecError, match="no codebook"):
            fmt.pack(z, key())
        fmt.learn(z, key())
        assert fmt.has_started
        assert (fmt.master.shape, fmt.master.dtype) == ((table.entries, table.width), torch.float32)
        assert fmt.usage.shape == (table.entries,)
        assert bool((fmt.usage >= 0).all())
        first, kept = fmt.master, fmt.master.clone()
        fmt.use_table(first)
        fmt.learn(tensor((4, 40), seed=3), key(microbatch=2))
        assert not torch.equal(fmt.master, kept)
        assert torch.equal(first, kept)
        assert all(math.isfinite(value) for value in fmt.measures().values())
        with pytest.raises(CodecError, match="wants a table"):
            fmt.use_table(torch.zeros(table.entries + 1, table.width))


@pytest.mark.parametrize("name", IDEMPOTENT)  # of a codebook, a token's scale is not that of its code
@laws
@given(shape=shapes, dtype=dtypes, magnitude=magnitudes, seed=st.integers(0, 5))
def test_nearest_rounding_twice_gives_the_same_bytes(name, shape, dtype, magnitude, seed):
    assume(packable(name, shape))
    fmt = parse_format(SMALL.get(name, name))
    first = fmt.pack(tensor(shape, dtype, magnitude, seed), key())
    # a dtype that holds every value of the format exactly
    wide = torch.float64 if name == "fp64" else torch.float32
    again = fmt.pack(fmt.unpack(first, shape=shape, dtype=wide, key=key()), key())
    assert again == first


@pytest.mark.pairwise(len(FORMATS))  # every format, and every codec several times
@pytest.mark.parametrize(("spec", "name"), list(itertools.product(codec_names(), FORMATS)))
class TestCodecLaws:
    def halves(self, spec, name, context=CONTEXT):
        wire = parse_codec(SMALL.get(spec, spec), SMALL.get(name, name), SMALL.get(name, name))
        tokens = [
            wire.codec.tokens(self.stage(index), torch.ones(64, 24)) for index in (1, 2)
        ]  # a table of its own each
        sender = wire.codec.encoder(dataclasses.replace(context, tokens=tokens[0]))
        receiver = wire.codec.decoder(dataclasses.replace(context, tokens=tokens[1]))
        if wire.codec.table(24) is not None:
            table = sender.master
            assert table.shape == (wire.codec.table(24).entries, wire.codec.table(24).width)
            sender.use_table(table.clone())  # each its own copy, as from the wire
            receiver.use_table(table.clone())
        assert isinstance(sender, Encoder)
        assert isinstance(receiver, Decoder)
        return wire, sender, receiver

    def stage(self, index):
        return StageContext(seed=CONTEXT.seed, stage=index, width=CONTEXT.width, vocab_size=CONTEXT.vocab_size)

    def batch(self):
        generator = torch.Generator().manual_seed(4)
        hidden_BTD = torch.randn(2, 5, CONTEXT.width, generator=generator).requires_grad_()
        return hidden_BTD, torch.randint(0, CONTEXT.vocab_size, (2, 5), generator=generator)

    def test_a_step_across_the_boundary(self, spec, name):
        """Forward and backward as two nodes do it: nothing but payloads passes between the halves."""
        wire, sender, receiver = self.halves(spec, name)
        hidden_BTD, ids_BT = self.batch()
        z_BTW = sender.encode(hidden_BTD, ids_BT)
        shape = (2, 5, wire.codec.wire_width(CONTEXT.width))
        assert z_BTW.shape == shape
        prepare(wire.format(Direction.FORWARD), z_BTW)
        down = wire.format(Direction.FORWARD).pack(z_BTW, key())
        arrived_BTW = wire.format(Direction.FORWARD).unpack(down, shape=shape, dtype=torch.float32, key=key())
        arrived_BTW.requires_grad_()
        out_BTD = receiver.decode(arrived_BTW, ids_BT)
        assert out_BTD.shape == hidden_BTD.shape
        (out_BTD * out_BTD.detach().sign()).sum().backward()
        assert arrived_BTW.grad is not None
        assert bool(arrived_BTW.grad.any())
        prepare(wire.format(Direction.BACKWARD), arrived_BTW.grad)
        up = wire.format(Direction.BACKWARD).pack(arrived_BTW.grad, key(Direction.BACKWARD))
        dz_BTW = wire.format(Direction.BACKWARD).unpack(
            up, shape=shape, dtype=torch.float32, key=key(Direction.BACKWARD)
        )
        z_BTW.backward(dz_BTW)
        assert hidden_BTD.grad is not None
        assert hidden_BTD.grad.shape == hidden_BTD.shape
        assert bool(hidden_BTD.grad.any())

    def test_halves_share_no_storage(self, spec, name):
        _, sender, receiver = self.halves(spec, name)

        def own(half):
            held = [t for t in vars(half).values() if isinstance(t, torch.Tensor)]
            return {t.untyped_storage().data_ptr() for t in (*half.parameters(), *half.buffers(), *held)}

        assert not own(sender) & own(receiver)

    def test_what_is_learned_is_stepped_with_both_halves(self, spec, name):
        wire, sender, receiver = self.halves(spec, name)
        table = wire.codec.table(24)
        if table is None:
            assert sender.state_tensors() == {}
            for ask in (
                lambda: sender.master,
                lambda: sender.use_table(torch.zeros(24, 4)),
                lambda: sender.learn(None, rate=0.02),
                lambda: receiver.use_table(torch.zeros(24, 4)),
                receiver.take_gradient,
            ):
                with pytest.raises(CodecError, match="no learned table"):
                    ask()
            return
        hidden_BTD, ids_BT = self.batch()
        z_BTW = sender.encode(hidden_BTD, ids_BT)
        arrived_BTW = z_BTW.detach().requires_grad_()
        receiver.decode(arrived_BTW, ids_BT).sin().sum().backward()
        z_BTW.backward(arrived_BTW.grad)
        before, gradient = sender.master.clone(), receiver.take_gradient()
        assert gradient.shape == before.shape
        sender.learn(gradient, rate=0.02)
        assert not torch.equal(sender.master, before)
        with pytest.raises(CodecError):
            receiver.take_gradient()  # gathered once, sent once
        assert all(math.isfinite(value) for value in sender.measures().values())
        assert sender.state_tensors()

    def test_halves_are_a_function_of_the_context(self, spec, name):
        _, sender, receiver = self.halves(spec, name)
        torch.manual_seed(99)  # the global generator has no say
        _, sender2, receiver2 = self.halves(spec, name)
        for one, two in ((sender, sender2), (receiver, receiver2)):
            assert one.state_dict().keys() == two.state_dict().keys()
            assert all(
                torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
            )


def test_identity_passes_values_and_gradients_unchanged():
    codec = parse_codec("identity").codec
    hidden_BTD = torch.randn(2, 3, 24).requires_grad_()
    ids_BT = torch.zeros(2, 3, dtype=torch.int64)
    out_BTD = codec.decoder(CONTEXT).decode(codec.encoder(CONTEXT).encode(hidden_BTD, ids_BT), ids_BT)
    gradient_BTD = torch.randn(2, 3, 24)
    out_BTD.backward(gradient_BTD)
    assert torch.equal(out_BTD, hidden_BTD)
    assert hidden_BTD.grad is not None
    assert torch.equal(hidden_BTD.grad, gradient_BTD)


@pytest.mark.parametrize(
    ("args", "forward", "backward"),
    [
        (("bf16",), "bf16", "bf16"),
        (("int8", None, "int4"), "int8", "int4"),
        (("identity",), "fp32", "fp32"),
        (("identity", "fp64", "fp64"), "fp64", "fp64"),
        ((" bf16 ", "int8"), "int8", "bf16"),
    ],
)
def test_spec_strings(args, forward, backward):
    wire = parse_codec(*args)
    assert wire.codec.name == "identity"
    assert (wire.format(Direction.FORWARD).id, wire.format(Direction.BACKWARD).id) == (forward, backward)
    assert parse_codec(*args).forward is not wire.forward  # formats may have state


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("bf17",), "unknown codec 'bf17'; the nearest known one is 'bf16'"),
        (("identiy",), "unknown codec 'identiy'; the nearest known one is 'identity'"),
        (("zzz",), "unknown codec 'zzz'; known: bf16, "),
        (("",), "unknown codec ''; known: "),
        (("bf16", "int9"), "unknown byte format 'int9'; the nearest known one is 'int8'"),
        (("bf16", None, "identity"), "unknown byte format 'identity'"),
        (("identity:r=3",), "codec 'identity' has no option 'r'; known: table"),
        (("int8:size=64",), "byte format 'int8' has no option 'size'; known: centre, feedback, hadamard"),
        (("bf16:block=64",), "byte format 'bf16' has no option 'block'; it has none"),
        (("identity:",), "options are key=value"),
    ],
)
def test_unknown_specs_are_refused_by_name(args, message):
    with pytest.raises(CodecError) as error:
        parse_codec(*args)
    assert message in str(error.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optioned(IdentityCodec):
    """A codec with one option of each type."""

    name = "optioned"
    default_forward = "int8"
    default_backward = "int4"
    r: int = 64
    rate: float = 0.5
    frozen: bool = False
    label: str = "x"
    anchors: Literal["none", "factorized"] = "none"
    levels: Literal[1, 2] = 1


@pytest.fixture
def optioned(monkeypatch):
    monkeypatch.setattr(registry, "_CODECS", dict(registry._CODECS))
    registry.register_codec(Optioned)


@pytest.mark.usefixtures("optioned")
class TestOptions:
    def test_options_are_typed_by_their_annotations(self):
        found = parse_codec("optioned: r=32, anchors=factorized,rate=1e-3,frozen=true,label=a b,levels=2")
        assert found.codec == Optioned(r=32, anchors="factorized", rate=1e-3, frozen=True, label="a b", levels=2)
        assert (found.forward.id, found.backward.id) == ("int8", "int4")
        assert parse_codec("optioned", None, "fp32").codec == Optioned()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("anchor=none", "codec 'optioned' has no option 'anchor'; the nearest known one is 'anchors'"),
            ("anchors=factorised", "option 'anchors' cannot be 'factorised'; the nearest known one is 'factorized'"),
            ("r=1.5", "option 'r' wants a whole number, got '1.5'"),
            ("rate=nan", "option 'rate' wants a finite number, got 'nan'"),
            ("frozen=1", "option 'frozen' cannot be '1'; known: false, true"),
            ("r=1,r=2", "option 'r' is given twice"),
            ("r", "options are key=value, separated by commas; got 'r'"),
            ("r=1,", "options are key=value, separated by commas; got ''"),
        ],
    )
    def test_wrong_options_are_refused_by_name(self, options, message):
        with pytest.raises(CodecError) as error:
            parse_codec(f"optioned:{options}")
        assert message in str(error.value)

    def test_a_name_is_registered_once(self):
        with pytest.raises(ValueError, match="two codecs or formats are called 'optioned'"):
            registry.register_codec(Optioned)


def test_keys_outside_their_range_are_refused():
    for name in ("seed", "boundary", "step", "microbatch"):
        for value in (-1, 2**63):
            with pytest.raises(ValueError, match=f"Key.{name} = {value}"):
                dataclasses.replace(key(), **{name: value})


def test_no_two_keys_share_random_bits():
    names = ("seed", "boundary", "step", "microbatch")
    keys = [
        key(direction, **dict(zip(names, values, strict=True)))
        for direction in Direction
        for values in itertools.product((0, 1), repeat=4)
    ]
    draws = {tuple(k.generator(stream).random_raw(4)) for k in keys for stream in (0, 1)}
    assert len(draws) == 2 * len(keys)
