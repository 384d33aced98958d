"""Which genes the policy keeps out of the encoder, by group (DESIGN section 4).

Transgenes name the study and V(D)J segments the clone; the other groups are by choice. Symbols are those that
``GeneTable.resolve`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carvae.errors import GeneError

Names = Sequence[str] | NDArray[np.object_]
"""Gene names, one per column."""

POLICY_GROUPS = ("transgene", "vdj", "mitochondrial", "ribosomal", "sex", "cell_cycle")

# fmt: off
TRANSGENES = (
    "CAR", "CART", "CAR-T", "CAR_transgene", "CAR_construct", "CAT_scFv", "CAT-CAR", "FMC63", "FMC63-28Z",
    "FMC63-BBZ", "FMC63-CAR", "Yescarta", "Kymriah", "Tecartus", "Breyanzi", "Abecma", "Carvykti", "axi-cel",
    "axicabtagene", "tisa-cel", "tisagenlecleucel", "brexu-cel", "liso-cel", "ide-cel", "cilta-cel", "muCD19BBz",
    "huCD19BBz", "CD19BBz", "CD19-28z", "CD19CAR", "CD22CAR", "CD22BBz", "BCMACAR", "BCMABBz", "GD2CAR", "HER2CAR",
    "MSLNCAR", "IL13OP", "IL13BBz", "SJCAR19", "IFNB1-5LTR", "5LTR", "3LTR", "LTR", "WPRE", "EGFRt", "tEGFR",
    "huEGFRt", "tCD19", "tNGFR", "dNGFR", "iCasp9", "iCaspase9", "iC9", "RQR8", "HSV-TK", "GFP", "EGFP", "copGFP",
    "mCherry", "tdTomato", "Cas9", "lentivirus", "lentiviral_vector", "retroviral_vector",
)
"""Features of vectors as studies name them; matched in any case and with any separator."""

# Tirosh et al., Science 352:189 (2016), doi:10.1126/science.aad0501: 43 genes of S and 54 of G2/M, symbols of 2024.
CELL_CYCLE = frozenset((
    "MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1 CENPU HELLS RFC2 RPA2 NASP RAD51AP1 "
    "GMNN WDR76 SLBP CCNE2 UBR7 POLD3 MSH2 ATAD2 RAD51 RRM2 CDC45 CDC6 EXO1 TIPIN DSCC1 BLM CASP8AP2 USP1 CLSPN "
    "POLA1 CHAF1B BRIP1 E2F8 HMGB2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO CENPF "
    "TACC3 PIMREG SMC4 CCNB2 CKAP2L CKAP2 AURKB BUB1 KIF11 ANP32E TUBB4B GTSE1 KIF20B HJURP CDCA3 JPT1 CDC20 TTK "
    "CDC25C KIF2C RANGAP1 NCAPD2 DLGAP5 CDCA2 CDCA8 ECT2 KIF23 HMMR AURKA PSRC1 ANLN LBR CKAP5 CENPE CTCF NEK2 "
    "G2E3 GAS2L3 CBX5 CENPA"
).split())
# fmt: on

_POLICY_PATTERNS = {
    # The joined segments only: constant genes (TRAC, TRBC1, IGHM, IGHD, ...) tell the lineage and stay.
    "vdj": re.compile(r"TR[ABGD][VJ]|TR[BD]D\d|IG[HKL][VJ]|IGHD\d"),
    "mitochondrial": re.compile(r"MT-"),
    # Proteins of both subunits and their processed pseudogenes; not the kinases RPS6K*.
    "ribosomal": re.compile(
        r"(?:RPL\d+(?:A|L|AL|L1)?|RPLP[0-2]|RPS\d+(?:A|L|X|Y1|Y2)?|RPSA2?|UBA52|FAU)(?:P\d+)?(?:-\d+)?$"
    ),
    # XIST and TSIX, and the male-specific genes of Y (HGNC location Y without the pseudoautosomal regions).
    "sex": re.compile(
        r"(?:XIST|TSIX|SRY|ZFY|UTY|VCY|PRORY|AMELY|DDX3Y|EIF1AY|KDM5D|NLGN4Y|PCDH11Y|PRKY|RPS4Y[12]|TBL1Y|TGIF2LY|TMSB4Y"
        r"|TXLNGY|USP9Y|VCY1B|BCORP1|ANOS2P|LINC0027[89]|LINC00280|FAM224[AB]|(?:PRY|XKRY|HSFY|CDY|DAZ)\d?[AB]?"
        r"|BPY2[BC]?|RBMY\d\w*|TSPY\d+|TTTY\d+[A-C]?|FAM197Y\d|FAM41AY\d)(?:-AS\d)?$"
    ),
}
_TRANSGENE_PARTS = re.compile(r"scfv|fmc63|wpre|(?:^|[^a-z0-9])car(?:[^a-z0-9]|$)|(?:bb|28)z(?:eta)?$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[^a-z0-9]+")
_TRANSGENE_KEYS = frozenset(_SEPARATORS.sub("", name.lower()) for name in TRANSGENES)


def is_transgene(name: str) -> bool:
    """Whether a feature is of a vector (CAR, marker, promoter or reporter), not of the human genome."""
    return _SEPARATORS.sub("", name.lower()) in _TRANSGENE_KEYS or _TRANSGENE_PARTS.search(name) is not None


def excluded_by_policy(symbols: Names, policy: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """For each group of the policy the genes that it keeps out of the encoder, bool [n_symbols].

    Parameters
    ----------
    symbols
        Approved symbols and other features, as ``resolve`` gives them.
    policy
        Any of ``POLICY_GROUPS``.

    Raises
    ------
    GeneError
        When a group does not exist.
    """
    if wrong := [group for group in policy if group not in POLICY_GROUPS]:
        raise GeneError(f"gene policy has no group {', '.join(wrong)}; choose from {', '.join(POLICY_GROUPS)}")
    return {group: np.fromiter((_in_group(name, group) for name in symbols), bool, len(symbols)) for group in policy}


def _in_group(name: str, group: str) -> bool:
    if group == "transgene":
        return is_transgene(name)
    if group == "cell_cycle":
        return name in CELL_CYCLE
    return _POLICY_PATTERNS[group].match(name) is not None
