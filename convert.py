"""Converts a trained network to or from diffusers, which need not be installed for it.

    python convert.py checkpoint=runs/<run of model=ddpm_paper>/model.safetensors out=exported
    python convert.py checkpoint=ddpm-cifar10-32 out=model.safetensors

The first writes a folder for `diffusers.DDPMPipeline.from_pretrained("exported")`. The second reads such a folder, for
example a downloaded copy of `google/ddpm-cifar10-32`. The folder does not know the data, the optimizer and the like:
our file then has the values of params.yaml, or those given as `config.seed=1`.
"""

from pathlib import Path

from modeling.config import parse
from modeling.options import ConvertConfig, check_out, weights_file
from modeling.system.command_line import script
from modeling.system.errors import UserError


@script("convert", ConvertConfig, parse)
def main(options: ConvertConfig) -> None:
    checkpoint, out = weights_file(Path(options.checkpoint)), Path(options.out)
    check_out(out, options.overwrite, is_folder=not checkpoint.is_dir())
    if checkpoint.is_dir() and (out.suffix != ".safetensors" or out.is_dir()):
        raise UserError(f"out={out}: must name a file *.safetensors, because checkpoint={checkpoint} is a folder")
    if not checkpoint.is_dir() and (out.is_file() or out.suffix in (".safetensors", ".pt")):
        raise UserError(f"out={out}: must name a folder, because checkpoint={checkpoint} is not one")

    from modeling.interchange.pipeline import read_pipeline, write_pipeline

    if checkpoint.is_dir():
        read_pipeline(checkpoint, out, options.config)
    else:
        write_pipeline(checkpoint, out)
    print(out)


if __name__ == "__main__":
    main()
