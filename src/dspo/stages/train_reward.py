"""Stage: train the reward model on the ratings and test it on the held-out ones."""

from dspo.data.csv_rows import write_csv
from dspo.data.files import write_json
from dspo.environment import device
from dspo.params import load_params
from dspo.reward.backbone import local_files, weights_sha256
from dspo.reward.checkpoint import save_reward
from dspo.reward.dataset import Stems, read_ratings
from dspo.reward.model import build_model
from dspo.reward.report import fit_temperatures, reward_report
from dspo.reward.training import score_differences, train_reward, view_differences
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "ratings", "output")
    params = load_params(paths.params)
    reward = params.active.reward
    splits = {name: read_ratings(paths.ratings / f"{name}.parquet") for name in ("train", "validation", "test")}
    inputs = [paths.ratings, *local_files(reward)]
    scratch = open_scratch("train_reward", {"seed": params.seed, "reward": reward.model_dump(mode="json")}, inputs)
    output = scratch.path / "reward"

    model = build_model(reward, params.seed, device())
    backbone_hash = weights_sha256(model.backbone.clip)
    stems = {name: Stems(model.backbone, pairs, reward.dtype, reward.views) for name, pairs in splits.items()}
    zero_shot = view_differences(model, stems["test"])[:, model.heads.index("overall")]
    checkpoint = scratch.path / "checkpoint.pt"
    trained = train_reward(model, stems["train"], stems["validation"], reward, params.seed, checkpoint)

    temperatures = fit_temperatures(model.heads, score_differences(model, stems["validation"]), splits["validation"])
    untrained = splits["train"].unlabelled(model.heads)
    save_reward(output, model, trained, reward, temperatures, untrained, backbone_hash)
    on_test = score_differences(model, stems["test"])
    report = reward_report(splits["test"], model.heads, on_test, zero_shot, temperatures, untrained, params.seed)
    write_json(report, output / "report.json")
    write_csv(trained.curve, list(trained.curve[0]), output / "curve.csv")
    scratch.publish({"reward": paths.output})


if __name__ == "__main__":
    run(main)
