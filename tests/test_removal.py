"One question about what is left: the same answers as the curves give, on images and texts, and clear words for questions that mean nothing"
import pytest, torch
from torch import nn

from libragrad_nb.metrics import faithfulness
from libragrad_nb.removal import ORDERS, Removal, remaining
from libragrad_nb.zoo import load, recall, scenes


def rand(*shape): return torch.rand(*shape, generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope='module')
def images(): return scenes(4, digits=2, seed=3).images


@pytest.mark.parametrize('name', ['vit_digits', 'vit_reg_digits', 'eva_digits', 'mixer_digits'])
def test_it_is_a_point_of_the_curve(name, images):
    model, maps, target = load(name), rand(4, 8, 8), torch.tensor([1, 7, 0, 3])
    curve, ask = faithfulness(model, images, maps, target).probability[:, :, 0], Removal(model, images)
    for k, order in enumerate(ORDERS):
        for step, share in [(0, 0.), (3, .3), (9, .9)]:
            p, gone = remaining(ask, maps, share, order)
            assert torch.equal(p.gather(1, target[:, None])[:, 0], curve[k, step])
            assert (gone.sum((1, 2)) == int(share*64)).all()


def test_batches_do_not_matter(images):
    ask = Removal(load('vit_digits'), images)
    a, b = (remaining(ask, rand(4, 8, 8), .4, batch_size=n)[0] for n in (1, 256))
    torch.testing.assert_close(a, b)


def test_words_of_a_text():
    model, texts = load('llama_recall'), recall(3, facts=3, seed=1)
    ask, maps = Removal(model, texts.tokens), rand(3, 1, texts.tokens.shape[1])
    p, gone = remaining(ask, maps, .5, 'least', target=texts.answers)
    curve = faithfulness(model, texts.tokens, maps, texts.answers, fractions=(.5,))
    assert torch.equal(p.gather(1, texts.answers[:, None])[:, 0], curve.probability[1, 1, 0])
    assert gone.shape == maps.shape and not gone[..., -1].any()  # the word that asks


def test_words_for_wrong_questions(images):
    ask = Removal(load('vit_digits'), images)
    for match, more in [('something must be left', dict(fraction=1)), ('something must be left', dict(fraction=-.1)),
                        ("'most' or 'least'", dict(order='best')), ('texts', dict(keep=rand(4, 64) > .5))]:
        with pytest.raises(ValueError, match=match): remaining(ask, rand(4, 8, 8), **dict(fraction=.5) | more)
    with pytest.raises(ValueError, match=r'spread\(map, \(8, 8\)\)'): remaining(ask, rand(4, 64, 64), .5)
    with pytest.raises(ValueError, match=r'map\[None\]'): remaining(ask, rand(8, 8), .5)


def test_one_output_has_no_probability(images):
    class One(nn.Module):
        def __init__(self): super().__init__(); self.inner = load('vit_digits')
        def forward(self, x): return self.inner(x)[:, :1]
    with pytest.raises(ValueError, match='softmax needs two'): remaining(Removal(One().eval(), images), rand(4, 8, 8), .5)


def test_the_whole_image_alone(images):
    "A curve of one point"
    f = faithfulness(load('vit_digits'), images, rand(4, 8, 8), 1, fractions=(0,))
    assert f.log_probability.shape == (2, 1, 1, 4) and f.srg().abs().max() == 0
