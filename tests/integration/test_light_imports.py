"""What must come fast imports nothing that is slow, each in a process of its own."""

import subprocess
import sys


def test_reading_a_configuration_needs_no_torch():
    code = "import sys, opd.config; sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_data_needs_no_torch():
    code = (
        "import sys; from opd.data import read_prompts_from; read_prompts_from(['x'], task='a', teacher='t'); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_comes_without_loading_what_a_run_needs():
    code = (
        "import sys; from opd.cli import app; app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
