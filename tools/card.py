"Draw nbs/card.png, which social networks show beside a link to the site (1200 x 630)"
from pathlib import Path
import matplotlib.pyplot as plt
from libragrad_nb import explain
from libragrad_nb.colours import heat
from libragrad_nb.zoo import load, scenes

model, scene = load('vit_digits'), scenes(1, digits=2, seed=3)
rgb, label = (scene.images[0].movedim(0, -1) + 1)/2, scene.labels[:, 0]
fig = plt.figure(figsize=(12, 6.3), facecolor='#16181d')
fig.text(.055, .85, 'libragrad_nb', color='#e6e8eb', fontsize=44, weight='bold')
fig.text(.055, .76, 'Gradients that add up: attribution for transformers', color='#e6e8eb', fontsize=25)
for k, rules in enumerate((None, 'plain', 'libra')):
    ax = fig.add_axes([.055 + .305*k, .13, .28, .28*12/6.3])
    if not rules: ax.imshow(rgb.numpy()); text, color = f'where is the {label.item()}?', '#e6e8eb'
    else:
        a = explain(model, scene.images, target=label, rules=rules)
        heat(ax, rgb, a.map[0]); ax.contour(scene.masks[0, 0].numpy(), [.5], colors='#111111', linewidths=1.5)
        text, color = f'{rules.title()}: {(a.completeness_error/a.score).abs().item():.0%} missing', {'plain': '#f08a4b', 'libra': '#7fc1ea'}[rules]
    ax.set(xticks=[], yticks=[])
    fig.text(.055 + .305*k, .055, text, color=color, fontsize=21)
fig.savefig(Path(__file__).resolve().parents[1]/'nbs/card.png', dpi=100)
