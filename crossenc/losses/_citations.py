"""The papers that losses cite on model cards, as BibTeX. Facts only."""

BURGES_2005 = """@inproceedings{burges2005learning,
  title = {Learning to Rank using Gradient Descent},
  author = {Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt and Hamilton, Nicole
            and Hullender, Greg},
  booktitle = {Proceedings of the 22nd International Conference on Machine Learning},
  pages = {89--96},
  year = {2005}
}"""

CAO_2007 = """@inproceedings{cao2007learning,
  title = {Learning to Rank: From Pairwise Approach to Listwise Approach},
  author = {Cao, Zhe and Qin, Tao and Liu, Tie-Yan and Tsai, Ming-Feng and Li, Hang},
  booktitle = {Proceedings of the 24th International Conference on Machine Learning},
  pages = {129--136},
  year = {2007}
}"""

XIA_2008 = """@inproceedings{xia2008listwise,
  title = {Listwise Approach to Learning to Rank: Theory and Algorithm},
  author = {Xia, Fen and Liu, Tie-Yan and Wang, Jue and Zhang, Wensheng and Li, Hang},
  booktitle = {Proceedings of the 25th International Conference on Machine Learning},
  pages = {1192--1199},
  year = {2008},
  doi = {10.1145/1390156.1390306}
}"""

LAN_2014 = """@inproceedings{lan2014position,
  title = {Position-Aware {ListMLE}: A Sequential Learning Process for Ranking},
  author = {Lan, Yanyan and Zhu, Yadong and Guo, Jiafeng and Niu, Shuzi and Cheng, Xueqi},
  booktitle = {Proceedings of the Thirtieth Conference on Uncertainty in Artificial Intelligence},
  pages = {449--458},
  year = {2014}
}"""

HINTON_2015 = """@misc{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  year = {2015},
  eprint = {1503.02531},
  archivePrefix = {arXiv},
  primaryClass = {stat.ML}
}"""

HENDERSON_2017 = """@misc{henderson2017efficient,
  title = {Efficient Natural Language Response Suggestion for Smart Reply},
  author = {Henderson, Matthew and Al-Rfou, Rami and Strope, Brian and Sung, Yun-hsuan and Lukacs, Laszlo and
            Guo, Ruiqi and Kumar, Sanjiv and Miklos, Balint and Kurzweil, Ray},
  year = {2017},
  eprint = {1705.00652},
  archivePrefix = {arXiv},
  primaryClass = {cs.CL}
}"""

WANG_2018 = """@inproceedings{wang2018lambdaloss,
  title = {The {LambdaLoss} Framework for Ranking Metric Optimization},
  author = {Wang, Xuanhui and Li, Cheng and Golbandi, Nadav and Bendersky, Michael and Najork, Marc},
  booktitle = {Proceedings of the 27th ACM International Conference on Information and Knowledge Management},
  pages = {1313--1322},
  year = {2018}
}"""

HOFSTATTER_2020 = """@misc{hofstatter2020improving,
  title = {Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
  author = {Hofst{\\"a}tter, Sebastian and Althammer, Sophia and Schr{\\"o}der, Michael and Sertkan, Mete and
            Hanbury, Allan},
  year = {2020},
  eprint = {2010.02666},
  archivePrefix = {arXiv},
  primaryClass = {cs.IR}
}"""

GAO_2021_RERANKERS = """@misc{gao2021rethink,
  title = {Rethink Training of {BERT} Rerankers in Multi-Stage Retrieval Pipeline},
  author = {Gao, Luyu and Dai, Zhuyun and Callan, Jamie},
  year = {2021},
  eprint = {2101.08751},
  archivePrefix = {arXiv},
  primaryClass = {cs.IR}
}"""

GAO_2021_GRADCACHE = """@misc{gao2021scaling,
  title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
  author = {Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},
  year = {2021},
  eprint = {2101.06983},
  archivePrefix = {arXiv},
  primaryClass = {cs.LG}
}"""

SCHLATT_2025 = """@inproceedings{schlatt2025rankdistillm,
  title = {{Rank-DistiLLM}: Closing the Effectiveness Gap Between Cross-Encoders and {LLMs} for Passage Re-ranking},
  author = {Schlatt, Ferdinand and Fr{\\"o}be, Maik and Scells, Harrisen and Zhuang, Shengyao and Koopman, Bevan and
            Zuccon, Guido and Stein, Benno and Potthast, Martin and Hagen, Matthias},
  booktitle = {Advances in Information Retrieval (ECIR 2025)},
  year = {2025},
  doi = {10.1007/978-3-031-88714-7_31}
}"""
