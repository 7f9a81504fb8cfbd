"""The page of `dvc plots show` with its libraries inside: `python -m modeling.comparison.dvc_page FILE`.

FILE is a template for `--html-template`. DVC's own loads the libraries from the network.
"""

import sys
from pathlib import Path

from modeling.comparison.page import libraries
from modeling.system.files import write_atomically

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>DVC plots</title>{refresh_tag}<script>LIBRARIES</script></head>
<body>{plot_divs}</body>
</html>
"""

if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), TEMPLATE.replace("LIBRARIES", libraries()).encode())
