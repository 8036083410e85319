"""``at_least.py FILE.json NAME BOUND``: exit with an error unless the value of NAME is at least BOUND."""

import json
import sys
from pathlib import Path

file, name, bound = sys.argv[1:]
value = json.loads(Path(file).read_text())[name]
print(f"{name} is {value:.4f}, required {bound}")
sys.exit(0 if value >= float(bound) else 1)
