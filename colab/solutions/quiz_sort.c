// Heapsort: no extra memory, and no order of the numbers is a bad one.
int less(double a, double b);

static void sift(double *x, long i, long n) {
  for (;;) {
    long top = i;
    for (long child = 2 * i + 1; child <= 2 * i + 2 && child < n; child++)
      if (less(x[top], x[child])) top = child;
    if (top == i) return;
    double kept = x[i];
    x[i] = x[top];
    x[top] = kept;
    i = top;
  }
}

void sort(double *x, long n) {
  for (long i = n / 2 - 1; i >= 0; i--) sift(x, i, n);
  for (long end = n - 1; end > 0; end--) {
    double largest = x[0];
    x[0] = x[end];
    x[end] = largest;
    sift(x, 0, end);
  }
}
