from maxtext_mudd.decode import run

if __name__ == "__main__":
  run()
