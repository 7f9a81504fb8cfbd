"""Stage 1: fetches, verifies and converts the data set.

    python prepare_data.py                     # CIFAR-10, from dataset.archive or downloaded to it
    python prepare_data.py dataset=shapes      # drawn by the project, no download
    python prepare_data.py dataset=folder dataset.pictures=/path/to/pictures    # any pictures

Writes <dataset.root>/<dataset.name>/{train.npy,test.npy,manifest.json}. A second run verifies and does nothing.
"""

from modeling.config import Config
from modeling.stage import parse_stage
from modeling.system.command_line import script
from modeling.system.signals import stopping_on_signals


@script("config", Config, parse_stage)
def main(config: Config) -> None:
    dataset = config.dataset
    with stopping_on_signals():
        from modeling.datasets.pictures import describe_passed_over, find_pictures
        from modeling.datasets.preparation import pictures_folder, prepare, unusable_list

        manifest, is_new = prepare(dataset)
        counts = ", ".join(f"{name} {entry['count']} images" for name, entry in manifest["files"].items())
        if pictures := manifest.get("pictures"):
            counts += f", of {pictures['count']} pictures, {pictures['duplicates']} of them duplicates"
            if pictures["unusable"]:
                counts += f", {pictures['unusable']} unusable (listed in {unusable_list(dataset)})"
            _, passed_over = find_pictures(pictures_folder(dataset))
            if passed_over:
                print(describe_passed_over(passed_over))
    print(f"{dataset.folder}: {counts} ({'written' if is_new else 'already there, verified'})")


if __name__ == "__main__":
    main()
