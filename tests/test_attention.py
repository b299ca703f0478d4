"`nn.MultiheadAttention` written out: every option, and what is refused"
from itertools import product
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from libragrad_nb.core import completeness_error, libra, test_complete as complete

N, B = 10, 2
causal, padding = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64), torch.arange(N).expand(B, N) > 6
masks = [{}, dict(attn_mask=causal), dict(attn_mask=causal < 0), dict(attn_mask=causal, is_causal=True),
         dict(key_padding_mask=padding), dict(key_padding_mask=padding, attn_mask=causal < 0),
         dict(key_padding_mask=padding.double()), dict(attn_mask=torch.randn(4*B, N, N).double())]
kinds = [{}, dict(bias=False), dict(add_bias_kv=True), dict(add_zero_attn=True), dict(add_bias_kv=True, add_zero_attn=True)]

def mha(**kwargs):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(64, 4, **kwargs).double().eval()
    for n, p in m.named_parameters():
        if 'bias' in n: nn.init.normal_(p)
    return m

@pytest.fixture
def tokens(): return torch.randn(B, N, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

@pytest.mark.parametrize('kind', kinds)
def test_options(kind, tokens):
    for first, weights, mask in product((True, False), (True, False), masks):
        x, m = tokens if first else tokens.transpose(0, 1), mha(batch_first=first, **kind)
        complete(lambda x: m(x, x, x, need_weights=weights, **mask)[0], x)

def test_shapes(tokens):
    m, other = mha(), mha(kdim=32, vdim=48, batch_first=True)
    complete(lambda x: m(x, x, x, key_padding_mask=padding[0])[0], tokens[0])
    complete(lambda x: other(x[:, :3], x[..., :32], x[..., :48])[0], tokens)
    complete(lambda x: other(torch.ones(B, 5, 64).double(), x[..., :32], x[..., :48])[0], tokens)

@pytest.mark.parametrize('options', [dict(), dict(training=False, static_k=torch.randn(40, 2, 16).double())])
def test_refused(options, tokens):
    m = mha()
    def attend(x): return F.multi_head_attention_forward(x, x, x, 64, 4, m.in_proj_weight, m.in_proj_bias, None, None, False,
                                                         .1, m.out_proj.weight, m.out_proj.bias, **options)[0]
    with pytest.raises(NotImplementedError): completeness_error(attend, tokens)

def test_softmax_by_any_name(tokens):
    def logits(x): return x@x.mT/64
    gates = [lambda s: s.softmax(-1), lambda s: F.softmax(s, -1), nn.Softmax(-1), lambda s: torch.softmax(input=s, dim=-1),
             lambda s: F.softmin(-s, -1), lambda s: torch.exp(s)/torch.exp(s).sum(-1, keepdim=True),
             lambda s: F.normalize(torch.exp_(s), p=1, dim=-1)]
    for gate in gates: complete(lambda x: gate(logits(x))@x, tokens)
    complete(lambda x: F.scaled_dot_product_attention(key=x, value=x, query=x, attn_mask=logits(x), scale=.3), tokens)

class Kernels(TorchDispatchMode):
    def __init__(self): super().__init__(); self.names = set()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))

def test_no_fast_path(tokens):
    encoder, fast = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).double().eval(), '_transformer_encoder_layer_fwd'
    with torch.no_grad(), Kernels() as stock: encoder(tokens)
    with torch.no_grad(), Kernels() as ours, libra(encoder): encoder(tokens)
    assert fast in stock.names and fast not in ours.names
