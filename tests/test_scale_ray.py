"The same maps by Ray, into the same folder"
import sys
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from libragrad_nb.scale import run, run_on_ray
from test_scale import QUICK, small, table, tidy

@pytest.fixture(scope='module')
def ray():
    ray = pytest.importorskip('ray', reason='Ray is not installed: pip install "libragrad_nb[ray]"')
    pytest.importorskip('ray.data', reason='Ray Data is not installed')
    for trial in range(3): # a busy machine can be too slow for it
        try: ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level='ERROR'); break
        except Exception:
            ray.shutdown()
            if trial == 2: raise
    yield ray
    ray.shutdown()

def test_ray_goes_on_where_a_run_stopped(ray, tmp_path):
    folder, out = table(tmp_path, 60), tmp_path/'out'
    rows = pq.read_table(folder/'0.parquet').to_pylist(); rows[5]['image']['bytes'] = b'no'
    pq.write_table(pa.Table.from_pylist(rows), folder/'0.parquet', row_group_size=4)
    reference = run(folder, tmp_path/'alone', small(), **QUICK)
    first = run(folder, out, small(), **QUICK)
    for p in sorted(out.glob('*.parquet'))[2:]: p.unlink() # as if it had been killed
    kept, _ = len(tidy(out)), (out/'skipped.csv').unlink()
    r = run_on_ray(folder, out, small(), concurrency=1, **QUICK)
    assert r.before == kept and r.explained == 59 - kept and list(r.skipped) == list(reference.skipped) == ['0.parquet:5'] and not list(out.glob('skipped-*'))
    (t, maps), (c, same) = r.read(), reference.read()
    assert tidy(out) == tidy(tmp_path/'alone') and set(t.columns) == set(c.columns)
    np.testing.assert_allclose(maps[t.id.argsort()], same[c.id.argsort()], rtol=1e-2, atol=1e-3)
    assert run(folder, out, small(), **QUICK).explained == 0 # and back
    with pytest.raises(ValueError, match='nobody would read'): run_on_ray(folder, out, small(), concurrency=3, **QUICK)
    with pytest.raises(ValueError, match='holds results with other'): run_on_ray(folder, out, small(1), **QUICK)

def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r'libragrad_nb\[ray\]'): run_on_ray(tmp_path, tmp_path/'out', small())
