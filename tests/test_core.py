"What core says to those who ask it for what it cannot do, and that it leaves nothing behind"
import pytest, torch, warnings
from torch import nn
from libragrad_nb import completeness_error, libra
from libragrad_nb.trace import trace
from test_hard_models import fresh
from untouched import untouched

def test_rules_that_are_none():
    for rules in (None, 3, [1], {'libra'}, b'libra', dict):
        with pytest.raises(TypeError, match='a name or a dictionary'), libra(fresh(), rules): pass
        with pytest.raises(TypeError, match='a name or a dictionary'): trace(fresh(), torch.randn(1, 3, 32, 32).double(), 1, rules)

def test_a_warning_that_is_an_error_leaves_no_hook():
    model = nn.Sequential(nn.LayerNorm(4), torch.jit.trace(nn.Linear(4, 4), torch.randn(1, 4))).eval()
    with untouched(model[0]), warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        with pytest.raises(UserWarning), libra(model, {nn.LayerNorm: lambda out, m, x: out}): pass

def test_what_has_no_completeness_error():
    for x in (None, 'x', [1.], {}, torch.tensor([1])):
        with pytest.raises(TypeError, match='floating'): completeness_error(lambda x: x, x)
    for f in (lambda x: None, lambda x: 1., lambda x: (x,), lambda x: x.detach()):
        with pytest.raises(ValueError, match='depends on x'): completeness_error(f, torch.randn(3))

def test_weights_that_are_a_number():
    x = torch.randn(3)
    assert abs(completeness_error(lambda x: 2*x, x, 1.)) < 1e-6

def test_an_output_of_zeros():
    assert completeness_error(lambda x: 0*x, torch.randn(3)) != completeness_error(lambda x: 0*x, torch.randn(3))

def test_callers_without_gradients():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(): assert abs(completeness_error(torch.tanh, torch.randn(3))) < 1e-5

def test_a_rule_that_returns_no_tensor():
    with pytest.raises(ValueError, match='depends on x'): completeness_error(nn.Linear(3, 2).eval(), torch.randn(1, 3), rules={nn.functional.linear: lambda *args, **kwargs: 1.})
