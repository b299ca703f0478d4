"The API reference: markdown of every public name, from the documentation that nbdev shows on the pages and from the modules themselves"
import ast, importlib, inspect, re, textwrap
from dataclasses import fields, is_dataclass
from fastcore.docments import docments
from nbdev.showdoc import show_doc

def told(node):
    "The text of a message in the code, with … for what is filled in"
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr): return ''.join(told(v) for v in node.values)
    if isinstance(node, ast.BinOp): return told(node.left) + told(node.right)
    return '…'

def errors(o):
    "What a function or class raises itself: (type, message)"
    try: tree = ast.parse(textwrap.dedent(inspect.getsource(o)))
    except (OSError, TypeError, SyntaxError): return []
    calls = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and n.exc.args]
    found = dict.fromkeys((ast.unparse(c.func), re.sub('(?:… ?)+', '… ', told(c.args[0])).strip()) for c in calls)
    return [(kind, text) for kind, text in found if text != '…']

def plain(text):
    "Markdown that shows this text; what stands in backticks stays code"
    return ''.join(t if t.startswith('`') else re.sub(r'([\\*_<>\[\]$])', r'\\\1', t) for t in re.split(r'(`[^`]*`)', text))

def methods_of(o):
    "Public methods and properties of a class, a line each"
    if not inspect.isclass(o): return
    for name, m in vars(o).items():
        f = m.fget if isinstance(m, property) else getattr(m, '__func__', m)
        if name.startswith('_') or not callable(f) or not (doc := inspect.cleandoc(f.__doc__ or '')): continue
        yield f'`.{name}' + ('' if isinstance(m, property) else f'({", ".join(p for p in inspect.signature(f).parameters if p not in ("self", "cls"))})') + f'`: {plain(doc.splitlines()[0])}'

def fields_of(o):
    "Fields of a dataclass with what is said of them, also by its bases"
    if not (inspect.isclass(o) and is_dataclass(o)): return
    said = {}
    for c in reversed(o.__mro__[:-1]): said |= {k: d['docment'] for k, d in docments(c, full=True).items() if d.get('docment')}
    for f in fields(o): yield f'`{f.name}`' + (f': {plain(said[f.name])}' if f.name in said else '')

def about(method):
    "Name, paper, formula and unit of a registered method"
    options = ', '.join(f'{k}={v!r}' for k, v in method.preset)
    facts = [f'`{method.name}`' + f' (`{options}`)'*bool(options), f'*{plain(method.paper)}*', f'$\\displaystyle {method.formula}$',
             f'in units of the {plain(method.unit)}' if method.unit else 'no unit: it ranks', f'rules `{method.rules}` unless named']
    return '- ' + ' · '.join(facts)

def entry(name, o, place, shown, link, registered):
    shown = re.sub(r'(?m)^### .*\n', '', shown).removeprefix('---').strip()
    lines = [f'### {name} {{#{place}.{name}}}', shown, f'Made and explained [here]({link}).']
    if inspect.isfunction(o) and '**' in str(inspect.signature(o)) and (more := docments(o, args_kwargs=True).get(k := list(inspect.signature(o).parameters)[-1])):
        lines.append(f'`**{k}`: {more}')
    if found := [*fields_of(o), *methods_of(o)]: lines.append('\n'.join(f'- {l}' for l in found))
    if registered: lines.append('\n'.join(['In `methods`:', '', *map(about, registered)]))
    if found := errors(o): lines.append('\n'.join(['Raises', '', *(f'- `{kind}`: {plain(text)}' for kind, text in found)]))
    return '\n\n'.join(lines)

SYMBOLS = """In the formulas $i$ is one of $L$ blocks, $t$, $s$, $p$ tokens, $c$ a channel, $h$ a head; $h_i$ what goes into block $i$ and $G_i$ the gradient of the score there,
$a_i = \\sum_c h_i G_i$; $\\beta_j$ what the constants added in block $j$ contribute; $A_i$ the attention, $\\nabla A_i$ its gradient, $\\bar A_i$ its mean over the heads."""

MAPS = 'gradient_maps attention_maps path_maps decompositions patching black_box'.split()  # the modules that register methods

def places():
    "Every registered method, by the place of its function"
    found = {}
    for n in MAPS:
        m = importlib.import_module(f'libragrad_nb.{n}')
        public = {getattr(m, k): f'{n}.{k}' for k in m.__all__ if inspect.isfunction(getattr(m, k))}
        for method in m.method.__globals__['methods'].values():
            if method.f in public: found.setdefault(public[method.f], []).append(method)
    return found

METHODS = places()  # now: the pages, when they are processed, register their own functions by the same names

def overview():
    "A table of all registered methods"
    rows = [f'| [`{m.name}`](#{place}) | {plain(m.paper)} | {m.unit or "none"} | {"pixels" if m.pixels else "tokens"} | {"yes" if m.attention else ""} | {"yes" if m.runs else ""} | `{m.rules}` |'
            for place, found in METHODS.items() for m in found]
    return '\n'.join(['| name | proposed by | unit | of | needs attention | runs the model itself | rules, if none are named |', '|'+'---|'*7, *rows])

def value(name, o, module):
    "What a constant is: its keys or its value, and the comment beside it"
    said = re.search(rf'(?m)^{name} *=[^#\n]*# (.*)$', inspect.getsource(module))
    if not isinstance(o, (dict, tuple, list)): what = f'{o:_}' if isinstance(o, int) else ''
    elif isinstance(o, dict) and 0 < len(o) < 10 and all(isinstance(v, (str, int, float)) for v in o.values()): what = ', '.join(f'`{k}` {plain(str(v))}' for k, v in o.items())
    elif 0 < len(o) <= 50: what = ', '.join(f'`{getattr(k, "__name__", k)}`' for k in o)
    else: what = f'{len(o)} entries'
    return f'- `{name}` ({type(o).__name__}{", " + plain(said[1]) if said else ""})' + f': {what}'*bool(what)

def module(name, title, about, page, shown, paper):
    "The part of the reference about one module"
    m = importlib.import_module(f'libragrad_nb.{name}')
    public = {k: getattr(m, k) for k in m.__all__}
    made = {k: show_doc(o)._repr_markdown_() for k, o in public.items() if k not in shown and inspect.isfunction(o)} # by a function, so that no page shows them
    shown, registered = {**shown, **made}, {k: METHODS.get(f'{name}.{k}', []) for k in public}
    head = [f'## {name} {{#module-{name}}}', f'`libragrad_nb.{name}`, from [{title}]({page}). {about}', *([paper] if paper else [])]
    if any(registered.values()): head.append(SYMBOLS)
    found = [entry(k, public[k], name, shown[k], page + f'#{k.lower()}'*(k not in made), registered[k]) for k in public if k in shown]
    if others := [k for k in public if k not in shown]: found.append('\n'.join(['### Constants', '', *(value(k, public[k], m) for k in others)]))
    if name == MAPS[0]: head.append('All that `explain` draws by name (`methods`):\n\n' + overview())
    return '\n\n'.join(head + found)
