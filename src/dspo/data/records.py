"""The columns of every table that passes from stage to stage."""

import pyarrow as pa

HEADS = ("overall", "alignment", "aesthetics", "fidelity", "detail")
GOLD, PROXY = "gold_overall", "reward_overall"  # the judged images' columns that a verdict is read from

CANDIDATES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("caption", pa.string()),
        ("weight", pa.float64()),
        ("sample_index", pa.int32()),  # unique within a prompt, over all samplers
        ("noise_index", pa.int32()),  # same prompt and value: same initial noise
        ("scheduler", pa.string()),
        ("steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),  # as generate.image_format
        # float16, little endian, C order: the sampler's last latent, in the UNet's scaled space
        ("latent", pa.binary()),
        ("latent_shape", pa.list_(pa.int32())),  # [4, h, w]
    ]
)

RATINGS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),  # any codec, in spite of the name that Pick-a-Pic gave the column
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),  # one rater's overall vote: 1 and 0, or 0.5 and 0.5 for a tie
        ("label_1", pa.float64()),
        *((f"y_{head}", pa.float64()) for head in HEADS),  # share of votes for the first, ties half; null: no label
        ("votes", pa.int32()),  # raters behind each share
        ("p_first", pa.float64()),  # true probability that a rater who decides takes the first; null for people
        ("source", pa.string()),  # "base": both images are the base model's own samples; "other"
    ]
)

PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("caption", pa.string()),
        ("weight", pa.float64()),
        ("jpg_0", pa.binary()),  # winner
        ("jpg_1", pa.binary()),  # loser
        ("label_0", pa.float64()),  # 1
        ("label_1", pa.float64()),  # 0
        *((f"score_{side}_{head}", pa.float64()) for side in (0, 1) for head in HEADS),
        ("rca_0", pa.float64()),  # CaPO's calibrated reward
        ("rca_1", pa.float64()),
        ("sample_index_0", pa.int32()),
        ("sample_index_1", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("steps", pa.int32()),
        ("scheduler", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("latent_0", pa.binary()),  # float16, little endian, C order
        ("latent_1", pa.binary()),
        ("latent_shape", pa.list_(pa.int32())),
        # SDXL's size conditions, of the winner: original height and width, top and left of the crop, height and width;
        # null: neither scaled nor cropped
        ("time_ids", pa.list_(pa.int32())),
    ]
)
