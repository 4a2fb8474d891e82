"""A small student learns scikit-learn's digits from eight teachers of mixed quality: python -m mtkd_fast.bench.demo"""
