"""Measures a trained model: bits per dimension, held-out loss, distances of its samples from the data, FID.

    python evaluate.py checkpoint=outputs/model.safetensors                       # into evaluation/
    python evaluate.py checkpoint=outputs/model.safetensors bits_images=10000 bits_timesteps=null out=evaluation/whole
    python evaluate.py checkpoint=model.safetensors 'measures=[fid]' num_images=50000 out=evaluation/fid
    python evaluate.py checkpoint=linear 'measures=[bits_per_dim,heldout_loss]' out=evaluation/linear
    python evaluate.py checkpoint=empirical 'measures=[heldout_loss,train_loss]' out=evaluation/empirical
    torchrun --nproc-per-node=8 evaluate.py checkpoint=model.safetensors    # the same numbers by 8 processes

"linear" is the best linear denoiser of the training images, for scale ("gaussian": of one mean and variance).
"empirical" is the optimal denoiser of the training images alone: between its two losses is the least that is possible.
Each number is written with its identity (model, data, sampler, n, extractor) to <out>/evaluation.json. The same command
resumes after a stop; what is measured already is not measured again.
"""

from pathlib import Path

from modeling.config import parse
from modeling.options import EvaluateConfig
from modeling.system.command_line import script
from modeling.system.files import check_writable
from modeling.system.signals import stopping_on_signals


@script("evaluate", EvaluateConfig, parse)
def main(options: EvaluateConfig) -> None:
    check_writable(Path(options.out) / "evaluation.json")
    with stopping_on_signals():
        from modeling.distributed.launcher import joined
        from modeling.measures.evaluation_file import FILE, describe_record
        from modeling.measures.plan import take_measures
        from modeling.measures.subject import load_subject

        with joined() as processes:
            subject = load_subject(options, processes)
            for name, record in take_measures(subject):
                print(describe_record(name, record), flush=True)
            print(subject.folder / FILE)


if __name__ == "__main__":
    main()
