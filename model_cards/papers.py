"""The papers that cards cite, by arXiv number."""

from .checkpoint import Checkpoint


TITLES = {
    "2101.03961": "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    "2105.15082": "M6-T: Exploring Sparse Expert Models and Beyond",
    "2202.08906": "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    "2202.09368": "Mixture-of-Experts with Expert Choice Routing",
    "2212.05055": "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    "2310.01334": "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
    "2401.06066": "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    "2401.13920": "LocMoE: A Low-Overhead MoE for Large Language Model Training",
    "2403.07652": "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    "2403.07816": "Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM",
    "2404.15247": "XFT: Unlocking the Power of Code Instruction Tuning by Simply Merging Upcycled Mixture-of-Experts",
    "2408.15664": "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    "2408.15901": "Nexus: Specialization meets Adaptability for Efficiently Training Mixture of Experts",
    "2410.07348": "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
    "2410.07524": "Upcycling Large Language Models into Mixture of Experts",
    "2412.19437": "DeepSeek-V3 Technical Report",
    "2502.19261": "Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization",
    "2504.06792": "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    "2505.21411": "Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity",
    "2509.00679": "Router Upcycling: Leveraging Mixture-of-Routers in Mixture-of-Experts Upcycling",
    "2510.13999": "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    "2605.23398": "TPMM-DPO: Trajectory-aware Preference-guided Model Merging for Iterative Direct Preference "
    "Optimization",
}


# What a step after the conversion is, by its command and its method, or the reference of DPO.
STEP_PAPERS = {
    ("iterative_dpo", "learned"): "2605.23398",
    ("merge", "learned"): "2404.15247",
    ("prune", "reap"): "2510.13999",
    ("prune", "easy_ep"): "2504.06792",
    ("prune", "merge"): "2310.01334",
}


def paper_url(number: str) -> str:
    """Return the page of a paper on the Hub."""
    return f"https://huggingface.co/papers/{number}"


def citation(number: str) -> str:
    """Return a link to a paper by its title."""
    return f"[{TITLES.get(number, number)}]({paper_url(number)}), arXiv {number}"


def papers_of(checkpoint: Checkpoint) -> list[str]:
    """Return the arXiv numbers of what a model is built on, each once, those of the conversion first."""
    numbers = [*checkpoint.description.get("papers", ())]
    for step in checkpoint.steps:
        key = (step["command"], step.get("method") or step.get("reference"))
        # XFT merges experts, not whole checkpoints.
        if key in STEP_PAPERS and not step.get("other_sources"):
            numbers.append(STEP_PAPERS[key])
    return list(dict.fromkeys(numbers))
