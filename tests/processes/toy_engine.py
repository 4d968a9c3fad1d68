"""A program that takes the arguments of `vllm serve` and serves a toy model, adapters too."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers import ToyServer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--served-model-name", required=True)
parser.add_argument("--host", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--max-lora-rank", type=int)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--slow", action="store_true")
options, _ = parser.parse_known_args()
if options.fail:
    print("WARNING ImportError: no such thing, which does no harm")
    print("(EngineCore pid=1) ERROR 11-23 [core.py:1] ValueError: no such device")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")
if options.slow:
    time.sleep(60)
assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
torch.set_num_threads(1)
model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
at = (options.host, options.port)
ToyServer(model, name=options.served_model_name, at=at, key=os.environ["VLLM_API_KEY"]).serve_forever()
