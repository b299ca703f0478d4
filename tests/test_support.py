"The support matrix: a sample of families in this process, and what happens to a row, a file and a name that go wrong"
import copy, json, os, signal, sys, time
from pathlib import Path

import pytest, torch
from torch import nn

from libragrad_nb import support
from libragrad_nb.support import HUGGING_FACE, check, committed, isolated, known_names, main, measure, read, report, sweep, table, verdict, versions

ROWS = committed()
CHEAP = sorted((n for n, r in ROWS.items() if verdict(r) == 'complete' and r['parameters'] < 7e6 and r['turnover'] < 500), key=lambda n: ROWS[n]['seconds'])[:26]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_committed_table():
    assert ROWS.keys() >= set(HUGGING_FACE) and len(ROWS) >= 90
    verdicts = [verdict(r) for n, r in ROWS.items() if n not in HUGGING_FACE]
    assert verdicts.count('complete') >= 70
    t = table()
    assert len(t) == len(ROWS) and t.parameters.notna().all() and t.torch.nunique() == 1
    assert (t.plain64.abs() > 1e-12).sum() > 70 # else most of the table would prove nothing


def test_sample_is_big_enough(): assert len(CHEAP) >= 20


@pytest.mark.parametrize('name', CHEAP)
def test_family(name):
    if name not in known_names(): pytest.skip(f'this version of timm has no {name}')
    f, x = support.build(name)[1:]
    try: copy.deepcopy(f).double()(x.double())
    except RuntimeError as e: pytest.skip(f'{name} of this version of timm does not run in float64: {e}')
    row, then = measure(f, x), ROWS[name]
    assert verdict(row) == 'complete'
    if abs(then['plain64']) > 1e-3 and abs(then['plain64']) < 2: assert abs(row['plain64']) > 1e-4 # the witness still has something to lose


@pytest.mark.filterwarnings("ignore:cumprod")
def test_a_leak_is_called_one():
    class Leaky(nn.Module):
        def forward(self, x): return x.cumprod(-1)
    row = measure(Leaky().eval(), torch.rand(2, 5) + .5)
    assert verdict(row) == 'leaks' and row['leak'].startswith('cumprod')


def fail(name): return 1/0
def no_row(name): return 3
def print_row(name):
    Path(f'{name}.ran').touch()
    return dict(libra32=0, libra64=0)


@pytest.mark.parametrize('name,work,reason', [
    (3, os._exit, 'exit code 3'), (signal.SIGABRT, signal.raise_signal, 'exit code -6'), ('x', fail, 'ZeroDivisionError'),
    (60, time.sleep, 'no answer within 3 s'), ('x', no_row, 'TypeError'), ('x', sys.exit, 'exit code 1')])
def test_a_process_that_goes_wrong_is_a_row(name, work, reason):
    row = isolated(name, timeout=3 if work is time.sleep else 60, work=work)
    assert row['name'] == name and reason in row['reason'] and verdict(row) == 'failed'


def test_too_much_memory_is_a_row():
    assert isolated(60, memory=.05, work=time.sleep)['reason'] == 'needs more than 0.05 GB'


def test_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def ran():
        found = sorted(p.stem for p in tmp_path.glob('*.ran'))
        for n in found: (tmp_path/f'{n}.ran').unlink()
        return found
    rows = sweep(['a', 'b'], 'rows', progress=False, work=print_row)
    assert ran() == ['a', 'b'] and read('rows') == rows and rows['a'].items() >= versions().items()
    sweep(['a', 'b', 'c'], 'rows', progress=False, jobs=2, work=print_row)
    assert ran() == ['c'] and read('rows').keys() == {'a', 'b', 'c'}
    monkeypatch.setattr(support, 'versions', lambda: versions() | dict(torch='0.1'))
    sweep(['a'], 'rows', progress=False, work=print_row)
    assert ran() == ['a'] and read('rows')['a']['torch'] == '0.1' and read('rows')['b'] == rows['b']
    sweep(['b', 'a'], 'rows', again=True, progress=False, work=print_row)
    assert ran() == ['a', 'b'] and not list(tmp_path.glob('*.part'))


def test_names(capsys):
    assert known_names() == known_names([]) and len(known_names()) > 90
    with pytest.raises(ValueError, match='unknown name .resnett.*resnet'): known_names(['vgg', 'resnett'])
    with pytest.raises(SystemExit): main(['--only', 'resnett'])
    assert 'such as resnet' in capsys.readouterr().err


def test_transformers_missing(monkeypatch):
    def missing(name): raise ModuleNotFoundError(f"No module named '{name}'")
    monkeypatch.setattr(support, 'import_module', missing)
    assert known_names(['BertModel']) == ['BertModel'] # on the list, so it gets its row
    with pytest.raises(ValueError, match='unknown name'): known_names(['BertForMaskedLM'])
    with pytest.raises(ImportError, match='pip install transformers'): check('BertModel')


def test_report(capsys):
    good, bad = (n for n in ROWS if verdict(ROWS[n]) == 'complete'), dict(name='b', reason='no answer within 3 s')
    a, b = next(good), next(good)
    assert report({a: ROWS[a], b: bad}) == [b]
    assert 'no answer within 3 s' in (out := capsys.readouterr().out) and '1 complete' in out and '1 failed' in out


def test_json_has_no_nan(): assert support._strict(dict(name='a', GB=float('nan'), seconds=.5)) == dict(name='a', GB=None, seconds=.5)

def test_command(tmp_path, capsys):
    "End to end: a row, then the same from the file"
    for _ in range(2):
        main(['--out', str(tmp_path/'rows'), '--only', 'resnet'])
        assert '1 complete' in capsys.readouterr().out
    row = json.loads((tmp_path/'rows').read_text())
    assert row['name'] == 'resnet' and row['same32'] and row['same64'] and row['GB'] > 0
