"The Colab cells: under the title, once, with what the page needs"
import sys
from pathlib import Path
from types import SimpleNamespace
import pytest

pytest.importorskip('nbdev')
from execnb.nbio import mk_cell, nb2str, new_nb, read_nb
from nbdev.config import get_config
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tools'))
import colab
sys.path.pop(0)

CFG = get_config(path=colab.ROOT)
PAGE = ['#| default_exp toy', 'import os, captum.attr as c\nfrom torch import nn']


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(colab, 'ROOT', tmp_path)
    (tmp_path/'nbs').mkdir(); path = tmp_path/'nbs/01_toy.ipynb'
    path.write_text(nb2str(new_nb([mk_cell('# Toy', 'markdown', id='title')] + [mk_cell(s, 'code', id=f'c{i}') for i, s in enumerate(PAGE)])))
    return path


def test_the_cells_stand_under_the_title_and_twice_is_once(page):
    text = colab.with_badge(page, [], CFG)
    page.write_text(text)
    assert colab.with_badge(page, [], CFG) == text
    title, badge, install, first, _ = read_nb(page).cells
    assert title.source == '# Toy' and first.source == PAGE[0] and (badge.id, install.id) == (colab.BADGE, colab.INSTALL)
    assert f'/{CFG.user}/{CFG.repo}/blob/{CFG.branch}/nbs/01_toy.ipynb)' in badge.source
    assert f'{CFG.lib_name}[black_box] @ git+{CFG.git_url}@{CFG.branch}' in install.source and install.source.startswith('#| hide\n#| eval: false\n')


def test_a_cell_that_was_edited_or_moved_is_put_right(page):
    text = colab.with_badge(page, [], CFG)
    page.write_text(text)
    nb = read_nb(page)
    nb.cells[1].source = nb.cells[1].source.replace('blob', 'tree'); nb.cells.append(nb.cells.pop(2))
    page.write_text(nb2str(nb))
    assert colab.with_badge(page, [], CFG) == text


@pytest.mark.parametrize('code, found, plain', [
    ('import torch, timm\nfrom pathlib import Path', [], []), ('    try: from transformers import LlamaConfig', [], ['transformers']),
    ('import quantus\nimport captum', ['black_box', 'quantus'], []), ("explain(vit, x, method='probe')", ['black_box'], []),
    ('import transformers\ntry: from an_encoder import A', ['text'], [])])
def test_what_a_page_needs(code, found, plain):
    cfg = SimpleNamespace(requirements='torch timm', d=dict(dev_requirements='pytest captum>=0.9 transformers>=4', black_box_requirements='captum>=0.9', quantus_requirements='quantus',
                                                            text_requirements='transformers>=4 an-encoder'))
    extras, others = colab.needs(code, ["@method('probe', runs=True)\ndef probe(): from captum import attr\n    import captum"], cfg)
    assert extras == found and [colab.module(r) for r in others] == plain


def test_a_folder_beside_the_notebooks_is_fetched():
    assert '/benchmarks' not in colab.install('x = 1', [], [], CFG)
    assert f'ln -sfn /tmp/{CFG.repo}/benchmarks /benchmarks' in colab.install("open('../benchmarks/a.json')", [], [], CFG)


def test_a_page_without_a_title_is_an_error(page):
    page.write_text(nb2str(new_nb([mk_cell('text', 'markdown')])))
    with pytest.raises(ValueError, match='01_toy.ipynb has no title'): colab.with_badge(page, [], CFG)
