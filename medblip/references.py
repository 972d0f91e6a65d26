"""BibTeX of everything that an evaluation may have used; methods.py picks what a report says was used."""

from __future__ import annotations

REFERENCES = {
    "chen2024medblip": """@inproceedings{chen2024medblip,
  title={{MedBLIP}: Bootstrapping Language-Image Pre-training from {3D} Medical Images and Texts},
  author={Chen, Qiuhui and Hong, Yi},
  booktitle={Asian Conference on Computer Vision (ACCV)},
  pages={2404--2420},
  year={2024},
  note={arXiv:2305.10799}
}""",
    "li2023blip2": """@inproceedings{li2023blip2,
  title={{BLIP-2}: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models},
  author={Li, Junnan and Li, Dongxu and Savarese, Silvio and Hoi, Steven},
  booktitle={International Conference on Machine Learning (ICML)},
  year={2023}
}""",
    "fang2023eva": """@inproceedings{fang2023eva,
  title={{EVA}: Exploring the Limits of Masked Visual Representation Learning at Scale},
  author={Fang, Yuxin and Wang, Wen and Xie, Binhui and Sun, Quan and Wu, Ledell and Wang, Xinggang and Huang, Tiejun
    and Wang, Xinlong and Cao, Yue},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages={19358--19369},
  year={2023}
}""",
    "luo2022biogpt": """@article{luo2022biogpt,
  title={{BioGPT}: generative pre-trained transformer for biomedical text generation and mining},
  author={Luo, Renqian and Sun, Liai and Xia, Yingce and Qin, Tao and Zhang, Sheng and Poon, Hoifung and Liu, Tie-Yan},
  journal={Briefings in Bioinformatics},
  volume={23},
  number={6},
  pages={bbac409},
  year={2022}
}""",
    "bolton2024biomedlm": """@misc{bolton2024biomedlm,
  title={{BioMedLM}: A {2.7B} Parameter Language Model Trained On Biomedical Text},
  author={Bolton, Elliot and Venigalla, Abhinav and Yasunaga, Michihiro and Hall, David and Xiong, Betty and Lee, Tony
    and Daneshjou, Roxana and Frankle, Jonathan and Liang, Percy and Carbin, Michael and Manning, Christopher D.},
  year={2024},
  note={arXiv:2403.18421}
}""",
    "chung2024flan": """@article{chung2024flan,
  title={Scaling Instruction-Finetuned Language Models},
  author={Chung, Hyung Won and Hou, Le and Longpre, Shayne and Zoph, Barret and Tay, Yi and Fedus, William and others},
  journal={Journal of Machine Learning Research},
  volume={25},
  number={70},
  pages={1--53},
  year={2024},
  note={arXiv:2210.11416}
}""",
    "raffel2020t5": """@article{raffel2020t5,
  title={Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer},
  author={Raffel, Colin and Shazeer, Noam and Roberts, Adam and Lee, Katherine and Narang, Sharan and Matena, Michael
    and Zhou, Yanqi and Li, Wei and Liu, Peter J.},
  journal={Journal of Machine Learning Research},
  volume={21},
  number={140},
  pages={1--67},
  year={2020}
}""",
    "radford2019gpt2": """@techreport{radford2019gpt2,
  title={Language Models are Unsupervised Multitask Learners},
  author={Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei, Dario and Sutskever, Ilya},
  institution={OpenAI},
  year={2019}
}""",
    "hu2022lora": """@inproceedings{hu2022lora,
  title={{LoRA}: Low-Rank Adaptation of Large Language Models},
  author={Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean
    and Wang, Lu and Chen, Weizhu},
  booktitle={International Conference on Learning Representations (ICLR)},
  year={2022}
}""",
    "rajbhandari2020zero": """@inproceedings{rajbhandari2020zero,
  title={{ZeRO}: Memory Optimizations Toward Training Trillion Parameter Models},
  author={Rajbhandari, Samyam and Rasley, Jeff and Ruwase, Olatunji and He, Yuxiong},
  booktitle={International Conference for High Performance Computing, Networking, Storage and Analysis (SC)},
  year={2020}
}""",
    "paszke2019pytorch": """@inproceedings{paszke2019pytorch,
  title={{PyTorch}: An Imperative Style, High-Performance Deep Learning Library},
  author={Paszke, Adam and others},
  booktitle={Advances in Neural Information Processing Systems (NeurIPS)},
  year={2019}
}""",
    "pedregosa2011scikit": """@article{pedregosa2011scikit,
  title={Scikit-learn: Machine Learning in {Python}},
  author={Pedregosa, Fabian and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}""",
    "efron1993bootstrap": """@book{efron1993bootstrap,
  title={An Introduction to the Bootstrap},
  author={Efron, Bradley and Tibshirani, Robert J.},
  publisher={Chapman and Hall},
  year={1993}
}""",
    "clopper1934limits": """@article{clopper1934limits,
  title={The use of confidence or fiducial limits illustrated in the case of the binomial},
  author={Clopper, Charles J. and Pearson, Egon S.},
  journal={Biometrika},
  volume={26},
  number={4},
  pages={404--413},
  year={1934}
}""",
    "zou2008limits": """@article{zou2008limits,
  title={Construction of confidence limits about effect measures: a general approach},
  author={Zou, Guang Yong and Donner, Allan},
  journal={Statistics in Medicine},
  volume={27},
  number={10},
  pages={1693--1702},
  year={2008}
}""",
    "newcombe2006mannwhitney": """@article{newcombe2006mannwhitney,
  title={Confidence intervals for an effect size measure based on the {Mann-Whitney} statistic. {Part} 2: asymptotic
    methods and evaluation},
  author={Newcombe, Robert G.},
  journal={Statistics in Medicine},
  volume={25},
  number={4},
  pages={559--573},
  year={2006}
}""",
    "brier1950verification": """@article{brier1950verification,
  title={Verification of forecasts expressed in terms of probability},
  author={Brier, Glenn W.},
  journal={Monthly Weather Review},
  volume={78},
  number={1},
  pages={1--3},
  year={1950}
}""",
    "naeini2015calibration": """@inproceedings{naeini2015calibration,
  title={Obtaining Well Calibrated Probabilities Using {Bayesian} Binning},
  author={Naeini, Mahdi Pakdaman and Cooper, Gregory F. and Hauskrecht, Milos},
  booktitle={AAAI Conference on Artificial Intelligence},
  year={2015}
}""",
    "cortes1995svm": """@article{cortes1995svm,
  title={Support-vector networks},
  author={Cortes, Corinna and Vapnik, Vladimir},
  journal={Machine Learning},
  volume={20},
  number={3},
  pages={273--297},
  year={1995}
}""",
    "papineni2002bleu": """@inproceedings{papineni2002bleu,
  title={{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={Annual Meeting of the Association for Computational Linguistics (ACL)},
  pages={311--318},
  year={2002}
}""",
    "lin2004rouge": """@inproceedings{lin2004rouge,
  title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  pages={74--81},
  year={2004}
}""",
    "petersen2010adni": """@article{petersen2010adni,
  title={{Alzheimer's Disease Neuroimaging Initiative (ADNI)}: clinical characterization},
  author={Petersen, Ronald C. and Aisen, Paul S. and Beckett, Laurel A. and Donohue, Michael C. and Gamst, Anthony C.
    and Harvey, Danielle J. and others},
  journal={Neurology},
  volume={74},
  number={3},
  pages={201--209},
  year={2010}
}""",
    "beekly2007nacc": """@article{beekly2007nacc,
  title={The {National Alzheimer's Coordinating Center (NACC)} database: the {Uniform Data Set}},
  author={Beekly, Duane L. and Ramos, Erin M. and Lee, William W. and Deitrich, Woodrow D. and Jacka, Mary E. and Wu,
    Joylee and others},
  journal={Alzheimer Disease \\& Associated Disorders},
  volume={21},
  number={3},
  pages={249--258},
  year={2007}
}""",
    "marcus2007oasis": """@article{marcus2007oasis,
  title={Open Access Series of Imaging Studies ({OASIS}): cross-sectional {MRI} data in young, middle aged, nondemented,
    and demented older adults},
  author={Marcus, Daniel S. and Wang, Tracy H. and Parker, Jamie and Csernansky, John G. and Morris, John C.
    and Buckner, Randy L.},
  journal={Journal of Cognitive Neuroscience},
  volume={19},
  number={9},
  pages={1498--1507},
  year={2007}
}""",
    "marcus2010oasis": """@article{marcus2010oasis,
  title={Open Access Series of Imaging Studies: longitudinal {MRI} data in nondemented and demented older adults},
  author={Marcus, Daniel S. and Fotenos, Anthony F. and Csernansky, John G. and Morris, John C. and Buckner, Randy L.},
  journal={Journal of Cognitive Neuroscience},
  volume={22},
  number={12},
  pages={2677--2684},
  year={2010}
}""",
    "lamontagne2019oasis3": """@misc{lamontagne2019oasis3,
  title={{OASIS-3}: Longitudinal Neuroimaging, Clinical, and Cognitive Dataset for Normal Aging and {Alzheimer}
    Disease},
  author={LaMontagne, Pamela J. and Benzinger, Tammie L. S. and Morris, John C. and Keefe, Sarah and Hornbeck, Russ
    and Xiong, Chengjie and others},
  year={2019},
  note={medRxiv 2019.12.13.19014902}
}""",
    "ellis2009aibl": """@article{ellis2009aibl,
  title={The {Australian Imaging, Biomarkers and Lifestyle (AIBL)} study of aging: methodology and baseline
    characteristics of 1112 individuals recruited for a longitudinal study of {Alzheimer's} disease},
  author={Ellis, Kathryn A. and Bush, Ashley I. and Darby, David and De Fazio, Daniela and Foster, Jonathan and Hudson,
    Peter and others},
  journal={International Psychogeriatrics},
  volume={21},
  number={4},
  pages={672--687},
  year={2009}
}""",
    "malone2013miriad": """@article{malone2013miriad,
  title={{MIRIAD} - Public release of a multiple time point {Alzheimer's} {MR} imaging dataset},
  author={Malone, Ian B. and Cash, David and Ridgway, Gerard R. and MacManus, David G. and Ourselin, Sebastien
    and Fox, Nick C. and Schott, Jonathan M.},
  journal={NeuroImage},
  volume={70},
  pages={33--36},
  year={2013}
}""",
}

COHORTS = {
    "ADNI": "petersen2010adni",
    "NACC": "beekly2007nacc",
    "OASIS1": "marcus2007oasis",
    "OASIS2": "marcus2010oasis",
    "OASIS3": "lamontagne2019oasis3",
    "AIBL": "ellis2009aibl",
    "MIRIAD": "malone2013miriad",
}
"""By the cohort names that `python -m sharding.manifest` gives."""

TOWERS = {
    "blip2": "li2023blip2",
    "qformer": "li2023blip2",
    "eva_vit_g": "fang2023eva",
    "biogpt": "luo2022biogpt",
    "biomedlm": "bolton2024biomedlm",
    "flan-t5": "chung2024flan",
    "t5": "raffel2020t5",
    "gpt2": "radford2019gpt2",
}
"""By a part of the tower's name, in small letters."""
