"The API reference: markdown of every public name, from the documentation that nbdev shows on the pages and from the modules themselves"
import ast, importlib, inspect, re, textwrap
from dataclasses import fields, is_dataclass
from fastcore.docments import docments

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
    return list(dict.fromkeys((ast.unparse(c.func), re.sub('(?:… ?)+', '… ', told(c.args[0])).strip()) for c in calls))

def plain(text): return re.sub(r'([\\*_<>\[\]$`])', r'\\\1', text)

def methods_of(o):
    "Public methods and properties of a class, a line each"
    if not inspect.isclass(o): return
    for name, m in vars(o).items():
        f = m.fget if isinstance(m, property) else getattr(m, '__func__', m)
        if name.startswith('_') or not callable(f) or not (doc := inspect.getdoc(f)): continue
        yield f'`.{name}' + ('' if isinstance(m, property) else f'({", ".join(p for p in inspect.signature(f).parameters if p not in ("self", "cls"))})') + f'`: {plain(doc.splitlines()[0])}'

def fields_of(o):
    "Fields of a dataclass with what is said of them, also by its bases"
    if not (inspect.isclass(o) and is_dataclass(o)): return
    said = {}
    for c in reversed(o.__mro__[:-1]): said |= {k: d['docment'] for k, d in docments(c, full=True).items() if d.get('docment')}
    for f in fields(o): yield f'`{f.name}`' + (f': {plain(said[f.name])}' if f.name in said else '')

def entry(name, o, place, shown, link, method):
    shown = re.sub(r'(?m)^### .*\n', '', shown).removeprefix('---').strip()
    lines = [f'### {name} {{#{place}.{name}}}', shown, f'Made and explained [here]({link}).']
    if found := [*fields_of(o), *methods_of(o)]: lines.append('\n'.join(f'- {l}' for l in found))
    if method: lines.append(f'*{plain(method.paper)}* · $\\displaystyle {method.formula}$' + (f' · in {plain(method.unit)}' if method.unit else ''))
    if found := errors(o): lines.append('\n'.join(['Raises', '', *(f'- `{kind}`: {plain(text)}' for kind, text in found)]))
    return '\n\n'.join(lines)

def module(name, title, about, page, shown, paper):
    "The part of the reference about one module"
    m = importlib.import_module(f'libragrad_nb.{name}')
    known = importlib.import_module('libragrad_nb.gradient_maps').methods
    public = {k: getattr(m, k) for k in m.__all__}
    things = [k for k, o in public.items() if k in shown]
    others = [k for k, o in public.items() if k not in shown]
    head = [f'## {name} {{#module-{name}}}', f'`libragrad_nb.{name}`, from [{title}]({page}). {about}', *([paper] if paper else [])]
    registered = {method.f: method for method in known.values()}
    found = [entry(k, public[k], name, shown[k], f'{page}#{k.lower()}', registered.get(public[k]) if callable(public[k]) else None) for k in things]
    if others: found.append('Also: ' + ', '.join(f'`{k}` ({type(public[k]).__name__})' for k in others) + '.')
    return '\n\n'.join(head + found)
