// Two threads that wait for a page which nobody brings: for the runner's test of what it can end.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static volatile char *pages;

static void *touch(void *page)
{
    return pages[4096 * (long)page] ? page : NULL;
}

int main(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = { .api = UFFD_API };
    pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register all = {
        .range = { .start = (unsigned long)pages, .len = 8192 },
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &all)) {
        perror("userfaultfd");
        return 1;
    }
    pthread_t other;
    if (pthread_create(&other, NULL, touch, (void *)1L))
        return 1;
    touch((void *)0L);
    return 1;
}
