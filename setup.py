"Build the package from `settings.ini`, the one place for metadata: edit there, not here."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent.resolve()  # also right when a build front end starts elsewhere
ini = ConfigParser(delimiters=['='])
if not ini.read(root/'settings.ini', encoding='utf-8'): raise FileNotFoundError(root/'settings.ini')
cfg = ini['DEFAULT']
needed = 'lib_name version description keywords author license status audience min_python lib_path git_url branch'.split()
if missing := [k for k in needed if k not in cfg]: raise KeyError(f'settings.ini lacks {missing}')

statuses = dict(enumerate('Planning,Pre-Alpha,Alpha,Beta,Production/Stable,Mature,Inactive'.split(','), 1))
spdx = dict(apache2='Apache-2.0', mit='MIT', bsd3='BSD-3-Clause')
lib, blob = cfg['lib_path'], f"{cfg['git_url']}/blob/{cfg['branch']}/"

def words(key): return cfg.get(key, '').split()

def long_description():
    "The README with its relative links made absolute, since a package index shows it without the repository around it"
    text = (root/'README.md').read_text(encoding='utf-8') if (root/'README.md').exists() else cfg['description']
    text = re.sub(r'(!\[[^\]]*\]\()(?!\w+:|#|/)([^)\s]+)', rf'\1{blob}\2?raw=true', text)
    return re.sub(r'(\]\()(?!\w+:|#|/)([^)\s]+)', rf'\1{blob}\2', text)

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=words('keywords'),
      author=cfg['author'], url=cfg['git_url'], license_expression=spdx[cfg['license']], license_files=['LICENSE'],
      classifiers=[f"Development Status :: {cfg['status']} - {statuses[int(cfg['status'])]}",
                   f"Intended Audience :: {cfg['audience']}", 'Programming Language :: Python :: 3 :: Only'],
      long_description=long_description(), long_description_content_type='text/markdown',
      python_requires=f">={cfg['min_python']}", install_requires=words('requirements'),
      extras_require={k.removesuffix('_requirements'): words(k) for k in cfg if k.endswith('_requirements')},
      packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=False, package_data={lib: words('package_data')},
      entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f'{lib}={lib}._modidx:d']})
